"""Which shared prefixes of a planned batch are computed, and which are held for whom.

Pure bookkeeping over the plan's prefix tree: no SGLang, no tensors. A *shared node* is a tree
node that at least two requests pass. It is COLD until a request, its leader, is scheduled to
compute it; COMPUTING until its KV has slots that later forward passes may read; then READY. A
READY node is pinned, itself or through a READY node below it, until the last request that passes
it has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from sglang_batchllm.planning import BatchPlan
from sglang_batchllm.planning.grouping import usable_depth
from sglang_batchllm.policy.requests import Request
from sglang_batchllm.policy.rows import Ask, Lead
from sglang_batchllm.policy.store import Store

COLD, COMPUTING, READY = range(3)
ROOT = 0


class Leader(Protocol):
    """What is noted about a request of the plan. home: its deepest shared node, or ROOT. claimed:
    shared nodes that it is scheduled to compute and has not yet, top down. matched: prompt tokens
    found in the cache when it was last scheduled. ask, lead: logprobs of its prompt that it has yet
    to be given, and those that it leaves."""

    home: int
    claimed: list[int]
    matched: int
    ask: Ask | None
    lead: Lead | None

    @property
    def request(self) -> Request: ...


class RowKeeper(Protocol):
    """Who keeps logprobs beside the nodes; see `scoring.Scoring`."""

    def claimed(self, member: Any) -> None: ...

    def published(self, member: Any, nodes: Iterable[int]) -> None: ...

    def unclaimed(self, member: Any) -> None: ...

    def let_go(self, node: int) -> None: ...


class PinnedTree:
    """The state of every shared node of one plan.

    `windowed.WindowedTree` is the one for models with a pool for sliding-window layers.

    pinned_tokens: tokens of all READY nodes that somebody still needs.
    times_relaxed: how often pins were given up, see `relax`.
    scoring: told of every change, where requests ask for logprobs of their prompts.
    """

    scoring: RowKeeper | None = None

    def __init__(
        self,
        plan: BatchPlan,
        store: Store,
        count: Callable[[int, int], None],
        least_saved: int = 0,
    ):
        """count: told how many tokens more are pinned, or fewer, and of those in the window
        pool. least_saved: nodes that save fewer tokens than that are no nodes here: what they add
        belongs to those below them."""
        tree = plan.tree
        self._store = store
        self._count = count
        num_requests = tree.num_requests.tolist()
        self.depth: list[int] = usable_depth(tree, plan.page_size).tolist()
        self.parent, shared = _worthwhile(
            tree.parent.tolist(), self.depth, num_requests, least_saved
        )
        self._state = bytearray(tree.num_nodes)
        self._state[ROOT] = READY
        self._pins: dict[int, Any] = {}
        self._foreign: dict[int, int] = {}  # node: leading tokens that were cached before us
        self._relaxed: set[int] = set()
        self.pinned_tokens = 0
        self.times_relaxed = 0

        self.home = [
            node if shared[node] else self.parent[node] for node in tree.request_node.tolist()
        ]
        # Unfinished requests at home in a node, plus its shared children that are not done.
        self._open = [0] * tree.num_nodes
        for node in self.home:
            self._open[node] += 1
        for node in range(1, tree.num_nodes):
            if shared[node]:
                self._open[self.parent[node]] += 1

    def is_ready(self, node: int) -> bool:
        return self._state[node] == READY

    def handle(self, node: int) -> Any:
        """To the pin of the node itself; None where it has none."""
        return self._pins.get(node)

    def path_state(self, member: Leader) -> tuple[int, int]:
        """The uppermost COMPUTING node on the member's path (ROOT if none) and the tokens of the
        path's COLD nodes."""
        node, blocker = member.home, ROOT
        while self._state[node] != READY:
            if self._state[node] == COMPUTING:
                blocker = node
            node = self.parent[node]
        return blocker, self.depth[member.home] - self.depth[node]

    def held_elsewhere(self, member: Leader, opened: int) -> int:
        """Tokens of the member's prompt beyond its READY nodes whose KV somebody holds anyway.

        opened: tokens of its COLD nodes.
        """
        held = self._store.locked(member.request.origin_input_ids, member.request.extra_key)
        return max(held - (self.depth[member.home] - opened), 0)

    def claim(self, member: Leader) -> None:
        """Make the member the leader of every COLD node on its path."""
        node = member.home
        claimed = []
        while self._state[node] != READY:
            self._state[node] = COMPUTING
            claimed.append(node)
            node = self.parent[node]
        member.claimed = claimed[::-1]
        if self.scoring is not None:
            self.scoring.claimed(member)

    def adopt(self, member: Leader) -> None:
        """What a leader was to compute, and somebody has left in the cache, is there already."""
        if not member.claimed:
            return
        request = member.request
        cached = self._whole(
            member, self._store.cached(request.origin_input_ids, request.extra_key)
        )
        if member.lead is not None:  # who has left it there has left no rows
            cached = min(cached, member.lead.ask.start)
        if cached > self.depth[self.parent[member.claimed[0]]]:
            member.matched = cached
            self.publish(member, cached)

    def computes_from(self, member: Leader) -> int | None:
        """Where a leader has to begin; None for where the cache ends."""
        return None

    def pass_ends_at(self, member: Leader) -> int | None:
        """Where a leader's first pass has to end; None for anywhere."""
        return None

    def window_tokens_of_cold(self, member: Leader) -> int:
        """What pins of the COLD nodes on the member's path would take of the window pool."""
        return 0

    def unclaim(self, member: Leader) -> None:
        """Give up what the member was to compute and has not."""
        for node in member.claimed:
            self._state[node] = COLD
        member.claimed = []
        if self.scoring is not None:
            self.scoring.unclaimed(member)

    def publish(self, member: Leader, computed: int) -> None:
        """Record that prompt tokens [0, computed) of a leader now have KV that others may read."""
        ready = [node for node in member.claimed if self.depth[node] <= computed]
        if not ready:
            return
        above = self.depth[self.parent[ready[0]]]
        member.claimed = member.claimed[len(ready) :]
        ready = self._pin_ready(ready, member)
        for node in ready:
            self._state[node] = READY
            if member.matched > above and node not in self._relaxed:
                self._foreign[node] = member.matched
        if self.scoring is not None:
            self.scoring.published(member, ready)
        self._add_pinned(ready, 1)

    def finish(self, member: Leader, free: bool, last_use: bool) -> None:
        """The member needs its prefixes no more; let go of those that nobody needs.

        free: give their KV back at once. last_use: see `Store.unpin`.
        """
        self.unclaim(member)
        done = []
        node = member.home
        self._open[node] -= 1
        while node != ROOT and self._open[node] == 0:
            done.append(node)
            node = self.parent[node]
            self._open[node] -= 1
        survivor = node
        self._pin_survivor(survivor, member, done)
        ready = [node for node in done if self._state[node] == READY]
        for node in ready:
            if self.scoring is not None:
                self.scoring.let_go(node)
            if node in self._pins:
                keep = max(self.depth[survivor], self._foreign.get(node, 0)) if free else None
                self._store.unpin(self._pins.pop(node), self.depth[node], keep, last_use)
        if ready:
            self._add_pinned(ready, -1)

    def relax(self, member: Leader | None) -> int:
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
                self._store.unpin(self._pins.pop(node), self.depth[node], None, False)
        for node, state in enumerate(self._state):
            if state == READY and node != ROOT and node not in path and self._open[node]:
                self._state[node] = COLD
                self._relaxed.add(node)
                if self.scoring is not None:
                    self.scoring.let_go(node)
                self._add_pinned([node], -1)
        return before - self.pinned_tokens

    def _pin(self, node: int, member: Leader) -> None:
        if node not in self._pins:
            request = member.request
            self._pins[node] = self._store.pin(
                request.origin_input_ids, request.extra_key, self.depth[node]
            )

    def _whole(self, member: Leader, cached: int) -> int:
        """Of a leader's cached tokens, those down to where all nodes are whole."""
        return cached

    def _pin_ready(self, nodes: list[int], member: Leader) -> list[int]:
        """Pin nodes of a path, top down, that have KV now; returns those that are READY."""
        self._pin(nodes[-1], member)
        return nodes

    def _pin_survivor(self, node: int, member: Leader, done: list[int]) -> None:
        """The member has ended, and with it the nodes `done` above its home, bottom up; the one
        above them goes on."""
        if done and node != ROOT and self._state[node] == READY:
            self._pin(node, member)

    def _add_pinned(self, nodes: list[int], sign: int) -> None:
        tokens = sign * sum(self.depth[node] - self.depth[self.parent[node]] for node in nodes)
        self.pinned_tokens += tokens
        self._count(tokens, 0)


def _worthwhile(
    parent: list[int], depth: list[int], num_requests: list[int], least_saved: int
) -> tuple[list[int], list[bool]]:
    """Each node's nearest shared one above it, and which are shared: by several requests, which
    save `least_saved` tokens by that or more. Parents come before their children."""
    above, shared = list(parent), [True] * len(parent)
    for node in range(1, len(parent)):
        if not shared[parent[node]]:
            above[node] = above[parent[node]]
        others = num_requests[node] - 1
        saved = others * (depth[node] - depth[above[node]])
        shared[node] = others > 0 and saved >= least_saved
    return above, shared
