"""A server that answers a job's requests: any that has OpenAI's endpoints, best one of ours."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import orjson

from sglang_batchllm.jobs.errors import BusyError, JobError, ServerLostError
from sglang_batchllm.jobs.records import Answer
from sglang_batchllm.wire.lines import chunks, read_answer, request_line
from sglang_batchllm.wire.paths import REPORT_PATH, RUN_PATH
from sglang_batchllm.wire.request_ids import new_batch_id

CONNECT_SECONDS = 30
SILENT_SECONDS = 60
"""How long one of ours may send nothing; while it has nothing to say it sends a heartbeat."""

AT_ONCE = 512
"""Requests that a server without ``--batchllm`` gets side by side."""

Answers = AsyncGenerator[tuple[int, Answer], None]
"""Rows and what became of them, as they finish."""

_GONE = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError)


class Request(NamedTuple):
    """One to send. row: its number. body: JSON."""

    row: int
    url: str
    body: bytes


@dataclass(frozen=True)
class About:
    """What a server says of itself. models: names that it serves. running: requests that it runs at
    a time, where it is one of ours, else None."""

    models: list[str]
    model_path: str
    tokenizer_path: str | None
    running: int | None


class Server:
    """url: such as http://127.0.0.1:30000. verify: whether to check its certificate, or the file of
    authorities to check it with. shared: others may ask it too, and go first."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        verify: bool | str = True,
        shared: bool = True,
    ):
        self.url = url.rstrip("/")
        self._yields = "true" if shared else "false"
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._verify = verify
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Before anything else, in the loop in which it is used; again after `close`."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(
                    limit=0,
                    ssl=self._certificates(),
                    # A server closes what idles for seconds, as while this process encodes a
                    # window; a list that met such a connection would look like a dead server.
                    force_close=True,
                ),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                read_bufsize=1 << 20,
            )

    def _certificates(self) -> bool | ssl.SSLContext:
        if isinstance(self._verify, bool):
            return self._verify
        return ssl.create_default_context(cafile=self._verify)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def is_ready(self) -> bool:
        """Whether it answers requests."""
        timeout = aiohttp.ClientTimeout(total=SILENT_SECONDS)
        try:
            async with self._open.get(self.url + "/health", timeout=timeout) as response:
                return response.status == 200
        except _GONE:
            return False

    async def about(self) -> About:
        """Raises ServerLostError where nobody answers, JobError where it is no server for us."""
        models = await self._get("/v1/models")
        if not isinstance(models, dict) or not isinstance(models.get("data"), list):
            raise JobError(f"{self.url} has no /v1/models; name a server with OpenAI's endpoints")
        names = [one["id"] for one in models["data"]]
        info = await self._get("/get_model_info") or {}
        ours = await self._get(RUN_PATH)
        path = info.get("model_path") or (names[0] if names else "")
        return About(names, path, info.get("tokenizer_path"), ours and ours["max_running_requests"])

    async def report(self) -> dict[str, Any]:
        """See `client.get_report`; for a server of ours."""
        return await self._get(REPORT_PATH)

    async def run_list(self, requests: Sequence[Request]) -> Answers:
        """Have requests planned and run together, by a server of ours: row and answer as they
        finish. Closing the iterator aborts what remains. Raises ServerLostError, BusyError, and
        JobError with its answer where it refuses the list."""
        lines = (
            request_line(place, request.body, False, request.url)
            for place, request in enumerate(requests)
        )
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
        )
        try:
            async with self._open.post(
                f"{self.url}{RUN_PATH}/{new_batch_id()}?yields={self._yields}",
                data=_body(lines),
                headers={"Content-Type": "application/x-ndjson"},
                timeout=timeout,
            ) as response:
                if response.status != 200:
                    text = await response.text()
                    if response.status == 503:
                        raise BusyError(f"{self.url} has no room now: {text}")
                    raise JobError(f"{self.url} refuses the requests: {text}")
                async for line in _lines(response.content):
                    if line.strip():
                        place, reply = read_answer(line)
                        yield requests[place].row, Answer(reply.status_code, reply.content)
        except _GONE as error:
            raise self._lost(error) from None

    async def run_each(self, requests: Sequence[Request]) -> Answers:
        """The same by any server, some `AT_ONCE` at a time."""
        at_once = asyncio.Semaphore(AT_ONCE)
        tasks = [asyncio.create_task(self._run_one(request, at_once)) for request in requests]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_one(self, request: Request, at_once: asyncio.Semaphore) -> tuple[int, Answer]:
        try:
            async with (
                at_once,
                self._open.post(
                    self.url + request.url,
                    data=request.body,
                    headers={"Content-Type": "application/json"},
                ) as response,
            ):
                text = await response.read()
        except _GONE as error:
            raise self._lost(error) from None
        return request.row, Answer(response.status, _decoded(text))

    async def _get(self, path: str) -> Any:
        """None where there is no such path."""
        timeout = aiohttp.ClientTimeout(total=SILENT_SECONDS)
        try:
            async with self._open.get(self.url + path, timeout=timeout) as response:
                if response.status in (401, 403):
                    raise JobError(f"{self.url} wants an API key; give it with --api-key")
                return _decoded(await response.read()) if response.status == 200 else None
        except _GONE as error:
            raise self._lost(error) from None

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "it is not open"
        return self._session

    def _lost(self, error: Exception) -> ServerLostError:
        reason = f"{error}" or type(error).__name__
        return ServerLostError(f"{self.url} does not answer: {reason}")


async def _body(lines: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks(lines):
        yield chunk


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Of any length."""
    begun: list[bytes] = []
    async for chunk in stream.iter_any():
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            begun.append(end)
            yield b"".join(begun)
            begun = []
        begun.append(rest)
    if any(begun):
        raise ConnectionError("it broke off within an answer")


def _decoded(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"error": {"message": text.decode(errors="replace")[:4096]}}


def encoded(body: dict[str, Any]) -> bytes:
    """A row's body, to send. Text that is no text (half of a surrogate pair) stays an escape."""
    try:
        return orjson.dumps(body)
    except TypeError:
        return json.dumps(body).encode()
