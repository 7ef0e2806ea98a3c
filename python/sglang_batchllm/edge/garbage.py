"""Python's garbage collector beside tens of thousands of requests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SWEEP_AFTER = 500
"""Times that objects were set aside until the collector looks at them after all."""

FREED_AT_ONCE = 512


class Leftovers:
    """Requests that are over, to be let go of a few at a time: to free 20,000 takes a quarter of a
    second."""

    def __init__(self) -> None:
        self._objects: list[object] = []

    def __bool__(self) -> bool:
        return bool(self._objects)

    def add(self, objects: Iterable[object]) -> None:
        self._objects += objects

    def free_some(self) -> None:
        del self._objects[-FREED_AT_ONCE:]

    async def free(self) -> None:
        """All, and others get their turns."""
        while self:
            self.free_some()
            await asyncio.sleep(0)


class Garbage:
    """Sets objects aside that are there for long, so that the collector does not look at them.

    It would look at all that lives again and again while thousands of requests come in: 3 of 3.5
    seconds for 20,000 of them. What is set aside goes when its last reference does; only cycles
    would stay, so now and then it looks at everything.
    """

    def __init__(self) -> None:
        self._times = 0

    def set_aside(self) -> None:
        """All that lives now. Takes no time."""
        self._times += 1
        gc.freeze()

    @contextmanager
    def made_for_long(self) -> Iterator[None]:
        """What is made within, by code that does not let others in."""
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            self.set_aside()
            if enabled:
                gc.enable()

    def sweep_if_due(self) -> None:
        """Call it when few requests live; takes up to half a second."""
        if self._times >= SWEEP_AFTER:
            gc.unfreeze()
            gc.collect()
            self._times = 0
            gc.freeze()
