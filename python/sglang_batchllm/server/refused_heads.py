"""A request whose head the HTTP server refuses is answered, however long it is.

uvicorn answers as soon as URL and headers are too long, and closes the connection while the client
still sends; the operating system then resets it, and the client never sees the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import (
    DEFAULT_MAX_INCOMPLETE_EVENT_SIZE,  # type: ignore[reportPrivateImportUsage]
    H11Protocol,
)

READ_BYTES = 64 << 20
READ_SECONDS = 10.0
"""What is read at most of a request that was refused, and for how long."""


class _Reader(asyncio.Protocol):
    """Reads what a client still sends, and leaves it; the connection is closed when it ends."""

    def __init__(self, transport: Any, closed: Callable[[Exception | None], None]):
        self._transport = transport
        self._closed = closed
        self._left = READ_BYTES
        self._timer = asyncio.get_running_loop().call_later(READ_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._closed(exc)


class _Open:
    """A transport that is not closed by who writes to it."""

    def __init__(self, transport: Any):
        self.write = transport.write

    def close(self) -> None:
        pass


def answer_refused_heads() -> None:
    """Of all servers in this process."""
    send = H11Protocol.send_400_response

    def send_400_response(self: H11Protocol, msg: str) -> None:
        most = self.config.h11_max_incomplete_event_size or DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
        if len(self.conn.trailing_data[0]) > most:
            msg = f"URL and headers of a request have at most {most} bytes together."
        transport: Any = self.transport
        self.transport = _Open(transport)  # type: ignore[assignment]
        try:
            send(self, msg)
        finally:
            self.transport = transport
        if transport.can_write_eof():
            transport.write_eof()
        transport.set_protocol(_Reader(transport, self.connection_lost))

    H11Protocol.send_400_response = send_400_response
