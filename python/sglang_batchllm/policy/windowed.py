"""Pins of shared prefixes where some layers see only a window of tokens, in a pool of their own, or
keep a state, which is a window of one."""

from __future__ import annotations

from collections.abc import Callable

from sglang_batchllm.planning import BatchPlan
from sglang_batchllm.policy.pins import COLD, READY, ROOT, Leader, PinnedTree
from sglang_batchllm.policy.step import WindowPool
from sglang_batchllm.policy.store import Store

MOST_PINNED = 2
"""Windows of one plan's pins take one token of so many of their pool at most; nodes beyond that
are computed again by who needs them."""

LEAST_SAVED = 32
"""Tokens that a kept state has to save where there are fewer slots than requests and branches of a
list. It takes the place of a request that could run, and prompts of a language branch in hundreds
of places: 2,000 English docstrings in 473, of which 443 save 1,752 tokens together, of 160,000."""


class WindowedTree(PinnedTree):
    """A request can go on from a prefix only while the window before the prefix's end is there. So
    each READY node at which one may still begin has a pin of its own: those at home there, and the
    leaders of nodes below that are not READY. What is above a window is held for the other layers
    alone, by any pin below.
    """

    def __init__(
        self,
        plan: BatchPlan,
        store: Store,
        count: Callable[[int, int], None],
        pool: WindowPool,
        least_saved: int = 0,
    ):
        super().__init__(plan, store, count, least_saved)
        self._pool = pool
        self._in_windows = 0
        # Unfinished requests at home in a node, plus its shared children neither READY nor done.
        self._beginnings = list(self._open)

    def computes_from(self, member: Leader) -> int | None:
        """At its last READY node, so that all that it claims gets windows."""
        return self.depth[self.parent[member.claimed[0]]] if member.claimed else None

    def pass_ends_at(self, member: Leader) -> int | None:
        """At the first state to be kept."""
        return self.depth[member.claimed[0]] if member.claimed and self._pool.recurrent else None

    def window_tokens_of_cold(self, member: Leader) -> int:
        node, tokens = member.home, 0
        while self._state[node] != READY:
            above = self.parent[node]
            tokens += min(self.depth[node] - self.depth[above], self._pool.window)
            node = above
        return min(tokens, self._pool.capacity // MOST_PINNED)

    def relax(self, member: Leader | None) -> int:
        """Of a path, too, all windows are given up: a request needs only the last one."""
        before = [node for node, state in enumerate(self._state) if state == READY]
        given_up = super().relax(None)
        for node in before:
            self._beginnings[self.parent[node]] += self._state[node] == COLD
        self._recount()
        return given_up

    def finish(self, member: Leader, free: bool, last_use: bool) -> None:
        pinned = len(self._pins)
        super().finish(member, free, last_use)
        if len(self._pins) != pinned:
            self._recount()

    def _whole(self, member: Leader, cached: int) -> int:
        request, whole = member.request, 0
        for node in member.claimed:
            depth = self.depth[node]
            if depth > cached:
                break
            if self._store.cached(request.origin_input_ids[:depth], request.extra_key) < depth:
                break
            whole = depth
        return whole

    def _pin_ready(self, nodes: list[int], member: Leader) -> list[int]:
        ready = []
        for node in reversed(nodes):
            distance = self.depth[node] - self.depth[self.parent[node]]
            tokens = self._in_windows + min(distance, self._pool.window)
            if self.scoring is None and tokens > self._pool.capacity // MOST_PINNED:
                self._state[node] = COLD
                continue
            self._state[node] = READY
            self._pin(node, member)
            self._recount()
            ready.append(node)
        ready.reverse()
        for node in ready:
            self._began(self.parent[node])
        self._recount()
        return ready

    def _pin_survivor(self, node: int, member: Leader, done: list[int]) -> None:
        for one in done:
            if self._state[one] != READY:
                self._began(self.parent[one])
        self._began(member.home)

    def _began(self, node: int) -> None:
        """One request or shared child fewer will begin at the node."""
        self._beginnings[node] -= 1
        last = self._beginnings[node] == 0 and self._open[node] > 0
        if last and self._state[node] == READY and node in self._pins:
            self._store.unpin(self._pins.pop(node), self.depth[node], None, False)

    def _recount(self) -> None:
        total = 0
        for node in self._pins:
            above = self.parent[node]
            while above != ROOT and above not in self._pins:
                above = self.parent[above]
            total += min(self.depth[node] - self.depth[above], self._pool.window)
        self._count(0, total - self._in_windows)
        self._in_windows = total
