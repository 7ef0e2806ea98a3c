"""Whether the slots for recurrent state suffice for waiting requests."""

from __future__ import annotations

import numpy as np


class StateSlots:
    """A request holds one slot from its beginning to its end; one that began without would be lost.
    The pin of a shared prefix holds one until those that begin at its end have ended. What begins
    now needs slots beside all pins. What waits for a prefix begins as others end, and their pins
    go with them: it is counted beside requests alone.

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
        The very first needs one: nobody would make room for the others."""
        alone, self._alone = self._alone, False
        self._now -= 1 + prefix
        self._in_time -= 1
        return self._now + prefix >= 0 if alone else min(self._now, self._in_time) >= 0

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
