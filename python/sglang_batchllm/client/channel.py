"""The client's side of a hand-over."""

from __future__ import annotations

import urllib.error
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import orjson
import requests
from sglang.lang.backend import runtime_endpoint
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from sglang_batchllm.client.exchange import in_process_server
from sglang_batchllm.wire.lines import CHUNK_BYTES, Reply, chunks, read_answers
from sglang_batchllm.wire.paths import RUN_PATH

CONNECT_SECONDS = 30
"""How long a server may take to accept a connection, or one chunk of what is sent to it: it reads
on only when it has tokenized what it has read."""

SILENT_SECONDS = 60
"""How long a server may send nothing. While it has nothing to say it sends a heartbeat every
second."""


@dataclass(frozen=True)
class Channel:
    """A way to hand a whole batch to a server or engine that runs with ``--batchllm``.

    max_running_requests: how many requests it runs at a time at most.
    """

    endpoint: RuntimeEndpoint
    max_running_requests: int

    def hand_over(
        self, batch: str, lines: Iterable[bytes]
    ) -> Generator[tuple[int, Reply] | None, None, None]:
        """Send `exchange.request_line`s, and yield their indices and answers as they finish, or
        None when there is none to report: first when the server has all lines, then every second.
        Ends with the last answer, but not before `end_programs` was called for every program that
        was to send more.

        batch: an id of `request_ids.new_batch_id`. Closing the iterator aborts what remains.
        Raises ConnectionError when the server goes away or falls silent, and RuntimeError with its
        answer when it refuses.
        """
        server = in_process_server(self.endpoint.base_url)
        if server is not None:
            yield from read_answers(server.hand_over(batch, chunks(lines)))
            return
        with (
            self._naming_the_server(),
            self._post(batch, chunks(lines), "application/x-ndjson") as response,
        ):
            yield from read_answers(response.iter_lines(CHUNK_BYTES))

    def end_programs(self, batch: str, programs: dict[int, bool]) -> None:
        """These programs of a hand-over send no more requests; raises as `hand_over` does. One that
        is not open any more holds nothing for them.

        programs: whether each of them sent more than it handed over.
        """
        server = in_process_server(self.endpoint.base_url)
        if server is not None:
            server.end_programs(batch, programs)
        else:
            body = orjson.dumps(programs, option=orjson.OPT_NON_STR_KEYS)
            with self._naming_the_server():
                self._post(f"{batch}/ended", body, "application/json", (200, 404)).close()

    @contextmanager
    def _naming_the_server(self) -> Iterator[None]:
        try:
            yield
        except requests.RequestException as error:
            raise ConnectionError(
                f"{self.endpoint.base_url} is gone, or was silent for {SILENT_SECONDS} s: {error}"
            ) from error

    def _post(
        self,
        path: str,
        data: bytes | Iterator[bytes],
        kind: str,
        expected: tuple[int, ...] = (200,),
    ) -> requests.Response:
        """kind: the media type of `data`. expected: statuses; RuntimeError for another one."""
        headers = {"Content-Type": kind}
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        response = requests.post(
            f"{self.endpoint.base_url}{RUN_PATH}/{path}",
            data=data,
            headers=headers,
            stream=True,
            timeout=(CONNECT_SECONDS, SILENT_SECONDS),
            verify=self.endpoint.verify or True,
        )
        if response.status_code not in expected:
            with response:
                raise RuntimeError(response.text)
        return response


_limits: WeakKeyDictionary[RuntimeEndpoint, dict[str, int] | None] = WeakKeyDictionary()


def find_channel(backend: object) -> Channel | None:
    """The channel to a backend, or None for one without ``--batchllm``; asked once of each."""
    if not isinstance(backend, RuntimeEndpoint):
        return None
    if backend not in _limits:
        try:
            response = runtime_endpoint.http_request(
                backend.base_url + RUN_PATH, api_key=backend.api_key, verify=backend.verify
            )
        except urllib.error.URLError:  # SGLang's own path says so in its own way
            return None
        _limits[backend] = response.json() if response.status_code == 200 else None
    limits = _limits[backend]
    return None if limits is None else Channel(backend, **limits)
