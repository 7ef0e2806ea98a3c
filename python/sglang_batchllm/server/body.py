"""Reading the body of a hand-over, within limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sglang_batchllm.server.errors import RefusedError
from sglang_batchllm.wire.lines import (
    GENERATE,
    MAX_BYTES,
    MAX_LINE_BYTES,
    MAX_REQUESTS,
    URLS,
)


@dataclass
class Room:
    """What is left of the limits for hand-overs that begin now."""

    bytes: int = MAX_BYTES
    requests: int = MAX_REQUESTS


@dataclass
class Share:
    """What one hand-over takes of the room, until `give_back`."""

    room: Room
    bytes: int = 0
    requests: int = 0

    def take(self, num_bytes: int, num_requests: int) -> None:
        """Raises RefusedError where there is no room: 413 if there never is, 503 if others have
        it."""
        self.bytes += num_bytes
        self.requests += num_requests
        self.room.bytes -= num_bytes
        self.room.requests -= num_requests
        if self.bytes > MAX_BYTES or self.requests > MAX_REQUESTS:
            raise RefusedError(
                413,
                f"a hand-over has at most {MAX_REQUESTS} requests and {MAX_BYTES} bytes; "
                "send the rest in another one",
            )
        if self.room.bytes < 0 or self.room.requests < 0:
            raise RefusedError(
                503,
                f"all open hand-overs together have at most {MAX_REQUESTS} requests and "
                f"{MAX_BYTES} bytes; send this one when others have ended",
            )

    def give_back(self) -> None:
        self.room.bytes += self.bytes
        self.room.requests += self.requests
        self.bytes = self.requests = 0


@dataclass
class LineSplitter:
    """Cuts a body into its lines, however it is cut into chunks, and leaves empty ones out."""

    _begun: list[bytes] = field(default_factory=list)  # pieces of the line that has yet to end
    _size: int = 0  # their bytes

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The lines that end in `chunk`. Raises RefusedError for one that is too long."""
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._append(end)
            yield from self.finish()
        self._append(rest)

    def finish(self) -> Iterator[bytes]:
        """The line that has begun, if it holds anything, as no more of it comes."""
        line = b"".join(self._begun)
        self._begun.clear()
        self._size = 0
        if line.strip():
            yield line

    def _append(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_LINE_BYTES:
            raise RefusedError(413, f"a line of a hand-over has at most {MAX_LINE_BYTES} bytes")
        if piece:
            self._begun.append(piece)


class Asked(NamedTuple):
    """A line of `wire.lines.request_line`."""

    program: int
    more: bool
    url: str
    body: Any


def read_line(line: bytes) -> Asked:
    """Raises ValueError for any other line; what is in the body is not looked at."""
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("the line is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the line is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError("a line is an object of program, more and request")
    program, more = entry.get("program"), entry.get("more")
    if type(program) is not int or not 0 <= program < 1 << 53:
        raise ValueError("program is the index of a program, from 0")
    if type(more) is not bool:
        raise ValueError("more is true if the program will send more requests, else false")
    url = entry.get("url", GENERATE)
    if url not in URLS:
        raise ValueError(f"url is one of {', '.join(URLS)}")
    if "request" not in entry:
        raise ValueError(f"request is missing: a body of {url}")
    return Asked(program, more, url, entry["request"])
