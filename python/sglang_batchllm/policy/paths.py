"""Which nodes of a plan's prefix tree a running request can read together with others."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sglang_batchllm.planning import BatchPlan

if TYPE_CHECKING:
    from sglang_batchllm.policy.pins import PinnedTree

LEVELS = 8
"""Most nodes of a path; `attention.groups` has room for as many."""
LEAST_SAVED = 240
"""Token reads that all requests of a node save if it is worth a level of its own."""

_IDS = itertools.count(1)

SharedPath = list[tuple[int, int]]
"""Nodes, outermost first: an id among all running ones, and the tokens from the root to its end."""


class SharedPaths:
    """The shared nodes of each request's path that attention is told of.

    Attention decides in each step which of them to read together (`attention/levels.py`). Where a
    path has more than it can be told of, the outermost that save enough are kept, and the one that
    the planner's groups have chosen as the best single one.
    """

    def __init__(self, plan: BatchPlan, pins: PinnedTree) -> None:
        self._pins = pins
        self._requests: list[int] = plan.tree.num_requests.tolist()
        self._best = set(plan.groups.node.tolist())
        self._paths: dict[int, SharedPath] = {}
        self._times_relaxed = 0

    def of(self, home: int, shared: int) -> SharedPath:
        """home: the request's deepest shared node. shared: leading tokens whose KV slots the
        request has in common with the cache. It can be less than a node's end, as for a request
        that computed its prompt's last token itself although others share it."""
        if self._times_relaxed != self._pins.times_relaxed:
            # A prefix that was given up and computed again has new slots, so it is another.
            self._times_relaxed = self._pins.times_relaxed
            self._paths.clear()
        path = self._path(home)
        if path and path[-1][1] > shared:
            return [node for node in path if node[1] <= shared]
        return path

    def _path(self, home: int) -> SharedPath:
        missing = []
        node = home
        while node and node not in self._paths:
            missing.append(node)
            node = self._pins.parent[node]
        path = self._paths[node] if node else []
        for node in reversed(missing):
            path = self._paths[node] = self._extended(path, node)
        return path

    def _extended(self, path: SharedPath, node: int) -> SharedPath:
        end = self._pins.depth[node]
        new = end - (path[-1][1] if path else 0)
        if new <= 0 or (self._requests[node] - 1) * new < LEAST_SAVED:
            return path
        if node in self._best:
            return [*path[: LEVELS - 1], (next(_IDS), end)]
        return [*path, (next(_IDS), end)] if len(path) < LEVELS - 1 else path
