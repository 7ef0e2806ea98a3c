"""How much KV the running requests will need before they give theirs back."""

from __future__ import annotations

import numpy as np


class MemoryForecast:
    """KV tokens in use over the decode steps to come, if requests end when they are expected to.

    Every request takes one more token per step and gives all of its own back at its end, so use
    is highest just before some request ends: those are the only moments looked at. A request may
    run beside others that will have ended before it is long, and one that would fit now is kept
    out if all would grow past the pool together.

    capacity, used: tokens of the KV pool, and those in use that nothing can evict, or promised to a
    prompt of which a part is still to be computed.
    refused: whether a request did not fit. Nothing is admitted after that: if later, smaller
    requests were, a large one would starve.
    """

    def __init__(self, capacity: int, used: int):
        self._capacity = capacity
        self._used = used
        self._growth = 0.0
        self._requests = 0
        self._new: list[tuple[float, int, float]] = []
        self._steps = np.empty(0)
        self._counts = np.empty(0)
        self._freed = np.empty(0)
        self.refused = False

    def keep(self, tokens: int) -> None:
        """Keep so many tokens free of what is admitted from now on."""
        self._used += tokens

    def add(self, steps: float, freed: float, count: int = 1) -> None:
        """In `steps` decode steps, `count` requests end and give back what they have decoded until
        then and `freed` tokens that are in use now. count 0: a shared prefix that is let go."""
        self._new.append((steps, count, freed))
        self._growth += steps * count
        self._requests += count

    def add_all(self, steps: np.ndarray, freed: np.ndarray, count: int = 1) -> None:
        """As `add`, with an entry for each."""
        self._steps = np.concatenate([self._steps, steps])
        self._counts = np.concatenate([self._counts, np.full(len(steps), count)])
        self._freed = np.concatenate([self._freed, freed])
        self._growth += float(steps.sum()) * count
        self._requests += len(steps) * count

    def admit(
        self, tokens: int, steps: float, count: int = 1, prefix: int = 0, kept: bool = False
    ) -> bool:
        """Add `count` requests that together take `tokens` of their own and `prefix` tokens that
        outlive them, and run for `steps` decode steps, if the pool holds all to the end. The very
        first request always may: nobody would make room for it.

        kept: their own tokens and what they decode outlive them too.
        """
        if self.refused:
            return False
        alone = not self._requests
        self.add(steps, -steps * count if kept else tokens, count)
        self._used += tokens + prefix
        fits = alone or self._used + self._growth <= self._capacity
        if not fits and self._peak() > self._capacity:
            self.refused = True
        return not self.refused

    def _peak(self) -> float:
        if self._new:
            steps, counts, freed = zip(*self._new, strict=True)
            self._new.clear()
            steps = np.concatenate([self._steps, steps])
            order = np.argsort(steps, kind="stable")
            self._steps = steps[order]
            self._counts = np.concatenate([self._counts, counts])[order]
            self._freed = np.concatenate([self._freed, freed])[order]
        ended = np.cumsum(self._counts) - self._counts
        freed_before = np.cumsum(self._freed) - self._freed
        use = (self._counts.sum() - ended) * self._steps - freed_before
        return self._used + float(use.max())
