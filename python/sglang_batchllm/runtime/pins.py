"""Which shared prefixes of a planned batch are computed, and which are held for whom.

Pure bookkeeping over the plan's prefix tree: no SGLang, no tensors. A *shared node* is a tree
node that at least two requests pass. It is COLD until a request, its leader, is scheduled to
compute it; COMPUTING until its KV has slots that later forward passes may read; then READY. A
READY node is pinned, itself or through a READY node below it, until the last request that passes
it has finished.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_batchllm.planning import BatchPlan
from sglang_batchllm.planning.grouping import usable_depth

COLD, COMPUTING, READY = range(3)
ROOT = 0


class PrefixStore(Protocol):
    """Where the KV of prefixes lives: SGLang's radix tree, see `cache.PinnedGroupCache`."""

    def pin(self, tokens: array, namespace: str | None, depth: int) -> Any:
        """Hold the cached prefix tokens[:depth] and return a handle to it."""
        ...

    def unpin(self, handle: Any, depth: int, free_from: int | None) -> None:
        """Let the prefix go; free its KV from token `free_from` on unless someone else uses it,
        or leave it to the cache's own eviction when that is None."""
        ...

    def locked(self, tokens: array, namespace: str | None) -> int:
        """Leading tokens of which the KV is cached and held by somebody."""
        ...


@dataclass(slots=True)
class Member:
    """A request's place in its batch.

    index: the request's index in the plan. home: its deepest shared node, or ROOT.
    claimed: shared nodes it is scheduled to compute and has not yet, top down.
    matched: prompt tokens found in the cache when it was last scheduled.
    """

    index: int
    home: int
    tokens: array
    namespace: str | None
    claimed: list[int] = field(default_factory=list)
    matched: int = 0
    finished: bool = False


class PinnedTree:
    """The state of every shared node of one plan.

    pinned_tokens: tokens of all READY nodes that somebody still needs.
    times_relaxed: how often pins were given up, see `relax`.
    """

    def __init__(self, plan: BatchPlan, store: PrefixStore, free_on_release: bool):
        tree = plan.tree
        self._store = store
        self._free_on_release = free_on_release
        self.parent: list[int] = tree.parent.tolist()
        self.depth: list[int] = usable_depth(tree, plan.page_size).tolist()
        self._state = bytearray(tree.num_nodes)
        self._state[ROOT] = READY
        self._pins: dict[int, Any] = {}
        self._foreign: dict[int, int] = {}  # node: leading tokens that were cached before us
        self._relaxed: set[int] = set()
        self.pinned_tokens = 0
        self.times_relaxed = 0

        num_requests = tree.num_requests.tolist()
        self.home = [
            node if num_requests[node] > 1 else self.parent[node]
            for node in tree.request_node.tolist()
        ]
        # Unfinished requests at home in a node, plus its shared children that are not done.
        self._open = [0] * tree.num_nodes
        for node in self.home:
            self._open[node] += 1
        for node in range(1, tree.num_nodes):
            if num_requests[node] > 1:
                self._open[self.parent[node]] += 1

    def path_state(self, member: Member) -> tuple[int, int]:
        """The uppermost COMPUTING node on the member's path (ROOT if none) and the tokens of the
        path's COLD nodes."""
        node, blocker = member.home, ROOT
        while self._state[node] != READY:
            if self._state[node] == COMPUTING:
                blocker = node
            node = self.parent[node]
        return blocker, self.depth[member.home] - self.depth[node]

    def held_elsewhere(self, member: Member, opened: int) -> int:
        """Tokens of the member's prompt beyond its READY nodes whose KV somebody holds anyway.

        opened: tokens of its COLD nodes.
        """
        if self._free_on_release:
            return 0  # handed over whole: its prompts are nobody else's
        held = self._store.locked(member.tokens, member.namespace)
        return max(held - (self.depth[member.home] - opened), 0)

    def claim(self, member: Member) -> None:
        """Make the member the leader of every COLD node on its path."""
        node = member.home
        claimed = []
        while self._state[node] != READY:
            self._state[node] = COMPUTING
            claimed.append(node)
            node = self.parent[node]
        member.claimed = claimed[::-1]

    def unclaim(self, member: Member) -> None:
        """Give up what the member was to compute and has not."""
        for node in member.claimed:
            self._state[node] = COLD
        member.claimed = []

    def settle(self, member: Member, computed: int) -> None:
        """Record that prompt tokens [0, computed) of a leader now have KV that others may read."""
        ready = [node for node in member.claimed if self.depth[node] <= computed]
        if not ready:
            return
        above = self.depth[self.parent[ready[0]]]
        for node in ready:
            self._state[node] = READY
            if member.matched > above and node not in self._relaxed:
                self._foreign[node] = member.matched
        member.claimed = member.claimed[len(ready) :]
        self.pinned_tokens += self.depth[ready[-1]] - above
        self._pin(ready[-1], member)

    def finish(self, member: Member) -> None:
        """The member needs its prefixes no more; release those that nobody needs."""
        assert not member.finished
        member.finished = True
        self.unclaim(member)
        done = []
        node = member.home
        self._open[node] -= 1
        while node != ROOT and self._open[node] == 0:
            done.append(node)
            node = self.parent[node]
            self._open[node] -= 1
        survivor = node
        if done and survivor != ROOT and self._state[survivor] == READY:
            self._pin(survivor, member)
        ready = [node for node in done if self._state[node] == READY]
        if ready:
            self.pinned_tokens -= self.depth[ready[0]] - self.depth[survivor]
        for node in ready:
            if node in self._pins:
                keep = max(self.depth[survivor], self._foreign.get(node, 0))
                self._store.unpin(
                    self._pins.pop(node), self.depth[node], keep if self._free_on_release else None
                )

    def relax(self, member: Member | None) -> int:
        """Leave every pin that is not on the member's path to the cache's own eviction, so that
        the member (or a request of another batch) can run. Those prefixes count as COLD again;
        returns their tokens."""
        self.times_relaxed += 1
        path = set()
        if member is not None:
            node = member.home
            while node != ROOT:
                path.add(node)
                node = self.parent[node]
            held = next((n for n in sorted(path, reverse=True) if self._state[n] == READY), None)
            if held is not None:
                self._pin(held, member)
        before = self.pinned_tokens
        for node in list(self._pins):
            if node not in path:
                self._store.unpin(self._pins.pop(node), self.depth[node], None)
        for node, state in enumerate(self._state):
            if state == READY and node != ROOT and node not in path and self._open[node]:
                self._state[node] = COLD
                self._relaxed.add(node)
                self.pinned_tokens -= self.depth[node] - self.depth[self.parent[node]]
        return before - self.pinned_tokens

    def _pin(self, node: int, member: Member) -> None:
        if node not in self._pins:
            self._pins[node] = self._store.pin(member.tokens, member.namespace, self.depth[node])
