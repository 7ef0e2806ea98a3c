"""Which rows of a planned batch's shared nodes are kept, and from where each request can score.

A leader leaves the rows (`rows`) of the nodes that it computes, as far as anybody who shares them
asks. A request that asks may then begin after the last node of its path of which the rows that it
wants are kept. Where they are not, since memory for them was short, it computes them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from sglang_batchllm.planning import BatchPlan
from sglang_batchllm.policy.pins import ROOT, Leader, PinnedTree
from sglang_batchllm.policy.rows import Asks, Lead, RowMemory, Rows


class Planned(Protocol):
    """What is asked of a `batch.Batch`."""

    @property
    def plan(self) -> BatchPlan: ...

    @property
    def order(self) -> Sequence[int]: ...

    @property
    def members(self) -> Sequence[Leader | None]: ...

    def places(self, node: int, /) -> range: ...

    def first_unfinished(self, places: range, /) -> Leader | None: ...


class Scoring:
    """The rows of one batch of which some requests ask for them."""

    def __init__(self, batch: Planned, pins: PinnedTree, memory: RowMemory):
        self._batch = batch
        self._pins = pins
        self._memory = memory
        self._rows: dict[int, Rows] = {}  # of READY nodes
        self._lacks_rows = False  # memory for some was short
        members = [batch.members[index] for index in batch.order]
        self._asks = Asks([member.ask if member else None for member in members])
        parent = batch.plan.tree.parent
        self._by_parent = np.argsort(parent, kind="stable")
        self._first_child = np.searchsorted(parent[self._by_parent], np.arange(len(parent) + 1))

    # What a leader leaves

    def claimed(self, member: Leader) -> None:
        """The member has become the leader of nodes; see what it has to leave."""
        if not member.claimed:
            return
        depth, top = self._pins.depth, member.claimed[0]
        places = self._batch.places(top)
        if self._asks.earliest(places.start, places.stop) >= depth[member.claimed[-1]]:
            return
        ask = self._asks.union(places.start, places.stop)
        ask = ask._replace(start=max(ask.start, depth[self._pins.parent[top]]))
        rows = {}
        for node in member.claimed:
            start = max(ask.start, depth[self._pins.parent[node]])
            if start < depth[node]:
                rows[node] = Rows(start, depth[node], ask, self._following(node))
        if not rows:
            return
        if self._memory.take(sum(one.bytes for one in rows.values())):
            member.lead = Lead(ask, rows)
        else:
            self._lacks_rows = True

    def published(self, member: Leader, nodes: Iterable[int]) -> None:
        """The pass that computes these nodes has been launched, and leaves their rows."""
        if member.lead is not None:
            for node in nodes:
                rows = member.lead.rows.pop(node, None)
                if rows is not None:
                    self._rows[node] = rows
            if not member.claimed:
                member.lead = None

    def unclaimed(self, member: Leader) -> None:
        """What the member has not computed it does not leave."""
        lead, member.lead = member.lead, None
        if lead is not None:
            self._memory.give_back(sum(one.bytes for one in lead.rows.values()))

    def let_go(self, node: int) -> None:
        """The node is READY no more."""
        rows = self._rows.pop(node, None)
        if rows is not None:
            self._memory.give_back(rows.bytes)

    def _following(self, node: int) -> list[int] | None:
        """The tokens that come after a node, where they differ."""
        depth = self._pins.depth[node]
        if depth < int(self._batch.plan.tree.depth[node]):
            return None
        children = self._by_parent[self._first_child[node] : self._first_child[node + 1]]
        following = set()
        for child in children.tolist():
            member = self._batch.first_unfinished(self._batch.places(child))
            if member is not None:
                following.add(member.request.origin_input_ids[depth])
        return sorted(following)

    # What others find

    def limit(self, member: Leader) -> int | None:
        """Prompt tokens that the member may find in the cache at most; None for all but one.

        It has to compute the rows that it leaves, and those that it asks and nobody has left.
        """
        limits = []
        if member.ask is not None:
            limits.append(self._scored(member, member.ask.start))
        if member.lead is not None and member.claimed:
            limits.append(member.lead.ask.start)
        return min(limits, default=None)

    def computed_again(self, member: Leader) -> int:
        """Tokens that have KV and are computed again for their rows."""
        if member.ask is None or not self._lacks_rows:
            return 0
        node = member.home
        while not self._pins.is_ready(node):
            node = self._pins.parent[node]
        cached = min(self._pins.depth[node], len(member.request.origin_input_ids) - 1)
        return max(cached - self._scored(member, member.ask.start), 0)

    def kept(self, member: Leader) -> list[Rows]:
        """The rows of the member's path, top down."""
        path = self._path(member)
        return [self._rows[node] for node in path if node in self._rows]

    def _scored(self, member: Leader, start: int) -> int:
        """To where the rows from `start` on are kept, without a gap."""
        depth = self._pins.depth
        for node in self._path(member):
            if not self._pins.is_ready(node):
                break
            if depth[node] > start:
                if node not in self._rows:
                    break
                start = depth[node]
        return start

    def _path(self, member: Leader) -> list[int]:
        path = []
        node = member.home
        while node != ROOT:
            path.append(node)
            node = self._pins.parent[node]
        return path[::-1]
