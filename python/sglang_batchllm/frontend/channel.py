"""The client's side of a hand-over."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import requests
from sglang.lang.backend import runtime_endpoint
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from sglang_batchllm.frontend.exchange import Reply, in_process_server, read_answers
from sglang_batchllm.frontend.run_route import RUN_PATH

_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Channel:
    """A way to hand a whole batch to a server or engine that runs with ``--batchllm``.

    max_running_requests: how many requests it runs at a time at most.
    """

    endpoint: RuntimeEndpoint
    max_running_requests: int

    def hand_over(self, lines: Iterable[bytes]) -> Iterator[tuple[int, Reply] | None]:
        """Send `exchange.request_line`s, and yield their indices and answers as they finish, or
        None when there is none to report for a second.

        Closing the iterator aborts what remains. Raises what `requests` raises when the server
        goes away, and RuntimeError with its answer when it refuses.
        """
        server = in_process_server(self.endpoint.base_url)
        if server is not None:
            yield from read_answers(server.hand_over(_chunks(lines)))
            return
        headers = {"Content-Type": "application/x-ndjson"}
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        with requests.post(
            self.endpoint.base_url + RUN_PATH,
            data=_chunks(lines),
            headers=headers,
            stream=True,
            verify=self.endpoint.verify or True,
        ) as response:
            if response.status_code != 200:
                raise RuntimeError(response.text)
            yield from read_answers(response.iter_lines(_CHUNK_BYTES))


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


def _chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    pending, size = [], 0
    for line in lines:
        pending.append(line)
        size += len(line)
        if size >= _CHUNK_BYTES:
            yield b"".join(pending)
            pending, size = [], 0
    if pending:
        yield b"".join(pending)
