"""Whether the slots for recurrent state suffice for waiting requests."""

from __future__ import annotations

import numpy as np


class StateSlots:
    """A request holds one slot from its beginning to its end. The pin of a shared prefix holds one
    for as long as a request may begin at its end: so it is in the way of what begins now, but of
    nothing that waits for the prefix, which takes its place.

    Asked as `WindowForecast` is, with tokens and steps that don't matter here.
    """

    def __init__(self, capacity: int, free: int, claimed: int, pinned: int):
        """capacity: slots. free: of them, or with a state that can be evicted. claimed: of those,
        promised to prefixes that are computed now. pinned: held by pins."""
        self._capacity = capacity
        self._now = free - claimed
        self._in_time = free + pinned
        self._pinned = pinned
        self._alone = True

    def keep_part(self, parts: int) -> None:
        """Keep one slot of so many free of what is admitted from now on."""
        self._now -= self._capacity // parts
        self._in_time -= self._capacity // parts

    def add_running(self, held: np.ndarray, steps: np.ndarray) -> None:
        """Requests that have their slots."""
        self._alone &= not len(held)

    def let_go(self, steps: np.ndarray, tokens: np.ndarray) -> None:
        """Shared prefixes, whose slots have been let go before."""

    def admit(self, tokens: int, steps: float, prefix: int = 0) -> bool:
        """Have a request begin, and pin `prefix` states on its way, unless there are too few slots.
        The very first may always."""
        alone, self._alone = self._alone, False
        self._now -= 1 + prefix
        self._in_time -= 1
        return alone or min(self._now, self._in_time) >= 0

    def set_aside(self, tokens: int, steps: float, count: int) -> bool:
        """Keep slots for `count` requests that wait for a prefix, unless there are too few."""
        self._in_time -= count
        return self._in_time >= 0

    def may_pin(self, states: int, largest: float) -> bool:
        """Whether so many more can be pinned beside a request; they are, then."""
        if self._pinned + states >= self._capacity:
            return False
        self._pinned += states
        return True

    def pin(self, states: int) -> None:
        """Pin so many more, in any case."""
        self._pinned += states
