"""Python's garbage collector beside tens of thousands of requests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SWEEP_AFTER = 500
"""Times that objects were set aside until the collector looks at them after all."""


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
