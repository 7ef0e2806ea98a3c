"""How far a batch is."""

from __future__ import annotations

import sys
import time
from typing import Protocol

import tqdm

LINE_SECONDS = 10
"""Between two lines where a bar can't be drawn over itself."""


class Progress(Protocol):
    """`tqdm.tqdm`, as far as we use it."""

    def update(self) -> object: ...

    def close(self) -> object: ...


def show_progress(total: int) -> Progress:
    """As SGLang does it on a terminal and in a notebook, and a line now and then elsewhere."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm.tqdm(total=total)
    return ProgressLines(total)


class ProgressLines:
    """Writes a line every `LINE_SECONDS`, and one at the end."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._started = self._written = time.monotonic()

    def update(self) -> None:
        self._done += 1
        if time.monotonic() - self._written >= LINE_SECONDS and self._done < self._total:
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        line = tqdm.tqdm.format_meter(self._done, self._total, self._written - self._started)
        print(line, file=sys.stderr, flush=True)
