"""How much the running requests will need of the pool of sliding-window layers."""

from __future__ import annotations

import numpy as np

from sglang_batchllm.policy.admission.forecast import MemoryForecast
from sglang_batchllm.policy.step import WindowPool

LARGEST_CHUNK = 4
"""A prompt is cut into chunks that leave room for others: of one, no more than this part of the
pool counts beside what the request holds when it decodes."""


class WindowForecast:
    """As `MemoryForecast`. A request grows until it holds its window and the pool's slack, and
    then stays; what its prompt takes beyond that is given back within as many steps as the slack
    has tokens. A shared prefix holds no more than its last window."""

    def __init__(self, pool: WindowPool, used: int, pinned: int):
        """used: tokens in use that nothing can evict. pinned: held by pins."""
        self._pool = pool
        self._most = pool.window + pool.slack
        self._forecast = MemoryForecast(pool.capacity, used)
        self._pinned = pinned

    @property
    def window(self) -> int:
        return self._pool.window

    def keep_part(self, parts: int) -> None:
        """Keep one token of so many free of what is admitted from now on."""
        self._forecast.keep(self._pool.capacity // parts)

    def add_running(self, held: np.ndarray, steps: np.ndarray) -> None:
        """Requests that have `held` tokens of their own and decode for `steps` more."""
        held = np.minimum(held, self._most)
        growth = np.minimum(self._most - held, steps)
        self._forecast.add_all(growth, -growth)
        self._forecast.add_all(steps, held + growth, count=0)

    def let_go(self, steps: np.ndarray, tokens: np.ndarray) -> None:
        """Shared prefixes of so many tokens are let go in so many steps."""
        self._forecast.add_all(steps, np.minimum(tokens, self.window), count=0)

    def admit(self, tokens: int, steps: float, prefix: int = 0) -> bool:
        """Add a request with `tokens` of its own, unless it does not fit.

        prefix: what the pins of new shared prefixes hold in this pool.
        """
        passing = min(max(tokens - self._most, 0), self._pool.capacity / LARGEST_CHUNK)
        self._forecast.add(self._pool.slack, passing, count=0)
        return self._add(tokens, steps, 1, prefix + int(passing))

    def set_aside(self, tokens: int, steps: float, count: int) -> bool:
        """As `admit`, for `count` requests that have so many tokens together and begin later."""
        return self._add(tokens / count, steps, count, 0)

    def _add(self, each: float, steps: float, count: int, beside: int) -> bool:
        held = min(each, self._most)
        growth = min(self._most - held, steps)
        self._forecast.add(steps, (held + growth) * count, count=0)
        return self._forecast.admit(int(held * count), growth, count, prefix=beside, kept=True)

    def may_pin(self, tokens: int, largest: float) -> bool:
        """Whether so many tokens more can be pinned with room for any request beside them; they
        are, then. largest: tokens of the largest."""
        if self._pinned + tokens + min(largest, self._most) > self._pool.capacity:
            return False
        self._pinned += tokens
        return True

    def pin(self, tokens: int) -> None:
        """Pin so many tokens more, in any case."""
        self._pinned += tokens
