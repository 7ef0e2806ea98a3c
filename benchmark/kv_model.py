"""A model of the KV pool: token counts of requests, and of the shared nodes of one plan's tree."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang_batchllm.runtime.batch import PlannedBatch
from sglang_batchllm.runtime.pins import ROOT


@dataclass(eq=False)
class Request:
    """What the runtime asks of a request of SGLang's, and `own`: KV tokens only it has.

    node, prefix_indices: where its prompt's cached prefix ended when it was last scheduled, and
    the tokens that have slots.
    """

    rid: str
    origin_input_ids: array[int]
    sampling_params: SimpleNamespace
    output_ids: list[int] = field(default_factory=list)
    prefix_indices: range = range(0)
    own: int = 0
    node: int = ROOT
    cached_tokens: int = -1
    already_computed: int = 0
    finished_reason: Any = None
    extra_key: None = None
    input_embeds: None = None
    positional_embed_overrides: None = None
    session: None = None
    to_finish: None = None

    def finished(self) -> bool:
        return self.finished_reason is not None

    @property
    def tokens(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def decoded(self) -> bool:
        return len(self.output_ids) >= self.sampling_params.max_new_tokens


class KVPool:
    """Stands for SGLang's allocator and radix cache, and is the pins' `PrefixStore`.

    A shared node that nobody uses stays until the space is needed, unless its pins say otherwise.
    own: tokens that only one request has each. evictable: tokens of shared nodes in no use.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.own = 0
        self.evictable = 0
        self._cached: dict[int, int] = {}  # tree node: tokens of its edge
        self._locks: Counter[int] = Counter()
        self._home: dict[int, int] = {}

    def attach(self, batch: PlannedBatch, prompts: Sequence[array[int]]) -> None:
        """Take the tree of `batch`, whose pins name a prompt by the very object in `prompts`."""
        self._parent, self._depth = batch.pins.parent, batch.pins.depth
        self._home = {id(p): home for p, home in zip(prompts, batch.pins.home, strict=True)}

    @property
    def used(self) -> int:
        """Without what could be evicted."""
        return self._filled - self.evictable

    @property
    def _filled(self) -> int:
        return self.own + sum(self._cached.values())

    @property
    def available(self) -> int:
        """Free or evictable tokens."""
        return self.capacity - self.used

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self._parent[node]
        return path[::-1]

    def match(self, home: int) -> int:
        """The deepest node on the way to `home` down to which all is cached."""
        deepest = ROOT
        for node in self.path(home):
            if node not in self._cached:
                break
            deepest = node
        return deepest

    def lock(self, node: int, by: int) -> None:
        for at in self.path(node):
            before = self._locks[at]
            self._locks[at] += by
            if not before or not self._locks[at]:
                self.evictable -= by * self._cached.get(at, 0)

    def take(self, tokens: int) -> None:
        """Slots for a request's own tokens; evicts the deepest unlocked nodes for it."""
        self.own += tokens
        for node in sorted(self._cached, reverse=True):
            if self._filled <= self.capacity:
                return
            if not self._locks[node]:
                self.evictable -= self._cached.pop(node)
        assert self._filled <= self.capacity, "out of KV"

    def share(self, request: Request, nodes: Sequence[int]) -> None:
        """`nodes`, one path, become the cache's; they were the request's own."""
        self.lock(request.node, -1)
        for node in nodes:
            if node not in self._cached:
                tokens = self._depth[node] - self._depth[self._parent[node]]
                self._cached[node] = tokens
                if not self._locks[node]:
                    self.evictable += tokens
                request.own -= tokens
                self.own -= tokens
        request.node = nodes[-1]
        self.lock(request.node, 1)

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> int:
        node = self._home[id(tokens)]
        while self._depth[node] > depth:
            node = self._parent[node]
        assert self._depth[node] == depth and self.match(node) == node
        self.lock(node, 1)
        return node

    def unpin(self, handle: int, depth: int, free_from: int | None) -> None:
        self.lock(handle, -1)
        node = handle
        while free_from is not None and self._depth[node] > free_from and not self._locks[node]:
            self.evictable -= self._cached.pop(node)
            node = self._parent[node]

    def locked(self, tokens: array[int], namespace: str | None) -> int:
        node = self._home[id(tokens)]
        while node and not self._locks[node]:
            node = self._parent[node]
        return self._depth[node]
