"""A model of the KV pool: token counts of requests, and of the shared nodes of plans' trees."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang_batchllm.policy.batch import Batch, Member, member_of
from sglang_batchllm.policy.pins import ROOT
from sglang_batchllm.policy.requests import End


@dataclass(eq=False)
class Request:
    """What the policy asks of a request of SGLang's, and what the engine model notes about it.

    own: KV tokens that only it has. place: where its prompt's cached prefix ended when it was last
    scheduled, None for nowhere. computed: tokens that have slots. ends_at: tokens after which it
    ends by itself.
    """

    rid: str
    origin_input_ids: array[int]
    sampling_params: SimpleNamespace
    ends_at: float = float("inf")
    output_ids: list[int] = field(default_factory=list)
    own: int = 0
    place: Any = None
    computed: int = 0
    cached_tokens: int = -1
    already_computed: int = 0
    end: End | None = None
    extra_key: None = None

    @property
    def tokens(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    def how_it_ends(self) -> End | None:
        if len(self.output_ids) >= self.sampling_params.max_new_tokens:
            return "length"
        return "stop" if len(self.output_ids) >= self.ends_at else None


def make_request(rid: str, prompt: Sequence[int], max_new_tokens: int) -> Request:
    sampling = SimpleNamespace(max_new_tokens=max_new_tokens)
    return Request(rid, array("q", prompt), sampling)


class KVPool:
    """Stands for SGLang's allocator and radix cache, and is the policy's `Store`.

    Only shared nodes are cached, each for its own batch, under the name that `Batch.node_id` gives
    it; one that nobody uses stays until the space is needed, unless its pins say otherwise.
    own: tokens that only one request has each. evictable: tokens of shared nodes in no use.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.own = 0
        self.evictable = 0
        self._cached: dict[int, int] = {}  # node: tokens of its edge
        self._locks: Counter[Any] = Counter()  # by node, or what else names one
        self._owner: dict[int, Request] = {}  # by the identity of its prompt

    def admit(self, request: Request) -> None:
        """A request that pins may name by the very object of its prompt."""
        self._owner[id(request.origin_input_ids)] = request

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

    def match(self, member: Member) -> tuple[Any, int]:
        """The deepest node on the way to the member's home down to which all is cached, and the
        tokens down to there."""
        if member.batch is None:
            return None, 0
        deepest = ROOT
        for node in _path(member.batch, member.home):
            if member.batch.node_id(node) not in self._cached:
                break
            deepest = node
        return (member.batch, deepest), member.batch.pins.depth[deepest]

    def hold(self, place: tuple[Batch, int] | None) -> None:
        self._lock(place, 1)

    def release(self, place: tuple[Batch, int] | None) -> None:
        self._lock(place, -1)

    def _lock(self, place: tuple[Batch, int] | None, by: int) -> None:
        for name in [] if place is None else map(place[0].node_id, _path(*place)):
            before = self._locks[name]
            self._locks[name] += by
            if not before or not self._locks[name]:
                self.evictable -= by * self._cached.get(name, 0)

    def take(self, tokens: int) -> None:
        """Slots for a request's own tokens; evicts the deepest unlocked nodes for it."""
        self.own += tokens
        for name in sorted(self._cached, reverse=True):
            if self._filled <= self.capacity:
                return
            if not self._locks[name]:
                self.evictable -= self._cached.pop(name)
        assert self._filled <= self.capacity, "out of KV"

    # The policy's Store

    def publish(self, request: Request, /) -> int:
        """The shared nodes that the request has computed become the cache's."""
        member = member_of(request)
        assert member is not None
        assert member.batch is not None
        batch, depth, parent = member.batch, member.batch.pins.depth, member.batch.pins.parent
        ready = [node for node in member.claimed if depth[node] <= request.computed]
        if ready:
            self.release(request.place)
            for node in ready:
                name = batch.node_id(node)
                if name not in self._cached:
                    tokens = depth[node] - depth[parent[node]]
                    self._cached[name] = tokens
                    if not self._locks[name]:
                        self.evictable += tokens
                    request.own -= tokens
                    self.own -= tokens
            request.place = batch, ready[-1]
            self.hold(request.place)
        return request.computed

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> tuple[Batch, int]:
        batch, node = self._home(tokens)
        while batch.pins.depth[node] > depth:
            node = batch.pins.parent[node]
        assert batch.pins.depth[node] == depth
        assert all(batch.node_id(at) in self._cached for at in _path(batch, node)), "not there"
        self.hold((batch, node))
        return batch, node

    def unpin(
        self, handle: tuple[Batch, int], depth: int, free_from: int | None, last_use: bool
    ) -> None:
        batch, node = handle
        self.release(handle)
        while free_from is not None and batch.pins.depth[node] > free_from:
            name = batch.node_id(node)
            if self._locks[name]:
                break
            self.evictable -= self._cached.pop(name)
            node = batch.pins.parent[node]

    def cached(self, tokens: array[int], namespace: str | None) -> int:
        batch, node = self._home(tokens)
        depth = 0
        for at in _path(batch, node):
            if batch.node_id(at) not in self._cached:
                break
            depth = batch.pins.depth[at]
        return depth

    def locked(self, tokens: array[int], namespace: str | None) -> int:
        batch, node = self._home(tokens)
        while node and not self._locks[batch.node_id(node)]:
            node = batch.pins.parent[node]
        return batch.pins.depth[node]

    def hold_text(self, tokens: array[int], namespace: str | None) -> tuple[None, int]:
        return None, 0  # the model knows of no programs

    def release_text(self, handle: None) -> None: ...

    def _home(self, tokens: array[int]) -> tuple[Batch, int]:
        member = member_of(self._owner[id(tokens)])
        assert member is not None
        assert member.batch is not None
        return member.batch, member.home


def _path(batch: Batch, node: int) -> list[int]:
    """The nodes from the root's child down to `node`."""
    path = []
    while node != ROOT:
        path.append(node)
        node = batch.pins.parent[node]
    return path[::-1]
