"""Which places of an order wait, in constant time per change."""

from __future__ import annotations

import numpy as np


class Waiting:
    """Flags over the places 0 to size - 1 of an order; searching runs at the speed of memory."""

    def __init__(self, size: int):
        self._flags = bytearray(size)
        self.count = 0

    def add(self, place: int) -> None:
        self.count += not self._flags[place]
        self._flags[place] = 1

    def discard(self, place: int) -> None:
        self.count -= self._flags[place]
        self._flags[place] = 0

    def first(self, start: int = 0, stop: int | None = None) -> int:
        """The first place in [start, stop) that waits, or -1."""
        return self._flags.find(1, start, len(self._flags) if stop is None else stop)

    def count_in(self, start: int, stop: int) -> int:
        return self._flags.count(1, start, stop)

    def places(self) -> np.ndarray:
        """All places that wait, ascending, int64[count]."""
        return np.flatnonzero(np.frombuffer(self._flags, np.uint8))
