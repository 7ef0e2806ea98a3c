"""How much of a batch is with the server at a time, as a server refuses what is more."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from sglang_batchllm.wire.lines import MAX_BYTES, MAX_REQUESTS


class Room:
    """What is left for the hand-overs of one batch that are open."""

    def __init__(self) -> None:
        self._requests = MAX_REQUESTS
        self._bytes = MAX_BYTES
        self._lock = threading.Lock()

    def take(self, requests: int, num_bytes: int) -> bool:
        """Whether there was room for these. Less than nothing gives room back."""
        with self._lock:
            if requests > self._requests or num_bytes > self._bytes:
                return False
            self._requests -= requests
            self._bytes -= num_bytes
            return True


class HandedOver:
    """The programs of a hand-over, as many as there is room for.

    programs: those whose requests have been taken so far, and those of which it is not known yet.
    """

    def __init__(self, programs: range, room: Room):
        self.programs = programs
        self.left = programs[:0]
        self._room = room
        self._requests = self._bytes = 0

    def take(self, program: int, lines: Sequence[bytes]) -> bool:
        """Whether there is room for the program's requests; if not, it and those after it are
        `left`, unless it is the first."""
        size = sum(map(len, lines))
        if self._room.take(len(lines), size):
            self._requests += len(lines)
            self._bytes += size
            return True
        if self._requests:
            self.left = range(program, self.programs.stop)
            self.programs = range(self.programs.start, program)
        return False

    def end(self) -> None:
        self._room.take(-self._requests, -self._bytes)
