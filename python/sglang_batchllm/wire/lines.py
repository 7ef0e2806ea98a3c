"""The lines of a hand-over: requests one way, answers the other, each a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

GENERATE = "/generate"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
URLS = (GENERATE, CHAT, COMPLETIONS)
"""What the requests of a hand-over may be for."""

MAX_LINE_BYTES = 8 << 20
"""Of a request. A prompt of a million tokens takes about 5 MB as text and 7 MB as token ids."""

MAX_BYTES = 512 << 20
MAX_REQUESTS = 100_000
"""Of all hand-overs that are open in a process: JSON received, and requests in it. The front
process holds about 10 KB for each request and 8 bytes for each token of its prompt."""

CHUNK_BYTES = 1 << 16
"""Of a body that is sent or read piece by piece, about."""


@dataclass(frozen=True)
class Reply:
    """What SGLang reads of an HTTP response. content: the decoded JSON body."""

    status_code: int
    content: Any

    def json(self) -> Any:
        return self.content

    @property
    def text(self) -> str:
        return json.dumps(self.content)

    def iter_lines(self, decode_unicode: bool = False) -> Iterator[bytes]:
        """The events of a streamed answer, whose content is an iterator of them."""
        return self.content


def encode(body: dict[str, Any]) -> bytes:
    """The request as JSON, the same for each time that a program sends it.

    With a chat template SGLang adds its stop strings to a list that the program may own, and so
    adds them again each time.
    """
    sampling_params = body["sampling_params"]
    stop = sampling_params.get("stop")
    if isinstance(stop, list):
        sampling_params = sampling_params | {"stop": list(dict.fromkeys(stop))}
        body = body | {"sampling_params": sampling_params}
    return json.dumps(body).encode()


def request_line(program: int, body: bytes, more: bool, url: str = GENERATE) -> bytes:
    """One request of a hand-over.

    program: its index in the batch. body: JSON, as `encode` gives it. more: see `tracing.Trace`.
    url: of `URLS`, which says what the body is.
    """
    return b'{"program":%d,"more":%s,"url":"%s","request":%s}\n' % (
        program,
        b"true" if more else b"false",
        url.encode(),
        body,
    )


def chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines put together, so that a body is sent in pieces of a good size."""
    pending, size = [], 0
    for line in lines:
        pending.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield b"".join(pending)
            pending, size = [], 0
    if pending:
        yield b"".join(pending)


def answer_line(index: int, status: int, content: dict[str, Any]) -> bytes:
    """The answer to the request with this index in its hand-over."""
    entry = {"index": index, "status": status, "content": content}
    return orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS) + b"\n"


def read_answers(lines: Iterable[bytes]) -> Iterator[tuple[int, Reply] | None]:
    """The answers in `lines` of `answer_line`; None for a heartbeat."""
    for line in lines:
        yield read_answer(line) if line.strip() else None


def read_answer(line: bytes) -> tuple[int, Reply]:
    """The index and the answer in a line of `answer_line`."""
    entry = orjson.loads(line)
    return entry["index"], Reply(entry["status"], entry["content"])
