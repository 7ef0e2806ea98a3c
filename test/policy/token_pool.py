"""A KV pool that caches by tokens, as SGLang's tree does: plans may change over it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

from kv_model import KVPool, Request
from sglang_batchllm.policy.batch import Member, member_of

Prefix = tuple[int, ...]


class TokenPool(KVPool):
    """Each cached token is named by the prompt that ends with it."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._tokens: set[Prefix] = set()

    @property
    def _filled(self) -> int:
        return self.own + len(self._tokens)

    def match(self, member: Member) -> tuple[Prefix, int]:
        *_, longest = (), *self._present(member.request.origin_input_ids)
        return longest, len(longest)

    def cached(self, tokens: array[int], namespace: str | None) -> int:
        return sum(1 for _ in self._present(tokens))

    def locked(self, tokens: array[int], namespace: str | None) -> int:
        return sum(1 for prefix in self._present(tokens) if self._locks[prefix])

    def _present(self, tokens: array[int]) -> Iterator[Prefix]:
        for prefix in _prefixes(tuple(tokens)):
            if prefix not in self._tokens:
                return
            yield prefix

    def _lock(self, place: Any, by: int) -> None:
        for prefix in _prefixes(place or ()):
            before = self._locks[prefix]
            self._locks[prefix] += by
            if not before or not before + by:
                self.evictable -= by * (prefix in self._tokens)

    def take(self, tokens: int) -> None:
        self.own += tokens
        for prefix in sorted(self._tokens, key=len, reverse=True):
            if self._filled <= self.capacity:
                return
            if not self._locks[prefix]:
                self._free(prefix)
        assert self._filled <= self.capacity, "out of KV"

    def _free(self, prefix: Prefix) -> None:
        self._tokens.remove(prefix)
        self.evictable -= 1

    def publish(self, request: Request, /) -> int:
        member = member_of(request)
        assert member is not None
        assert member.batch is not None
        shared = member.batch.pins.depth[member.home] if member.claimed else 0
        if member.batch.opening:
            shared = len(request.origin_input_ids)
        place = tuple(request.origin_input_ids[: min(shared, request.computed)])
        if len(place) > len(request.place or ()):
            for prefix in [*_prefixes(place)][len(request.place or ()) :]:
                request.own -= 1  # what is there twice is freed
                self.own -= 1
                if prefix not in self._tokens:
                    self._tokens.add(prefix)
                    self.evictable += not self._locks[prefix]
            self.release(request.place)
            request.place = place
            self.hold(place)
        return request.computed

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> Any:
        assert self.cached(tokens, namespace) >= depth, "not there"
        handle = tuple(tokens[:depth])
        self.hold(handle)  # type: ignore[arg-type]
        return handle

    def unpin(self, handle: Any, depth: int, free_from: int | None, last_use: bool) -> None:
        self.release(handle)
        for prefix in reversed([*_prefixes(handle)]):
            goes_on = any(other[:-1] == prefix for other in self._tokens)
            if free_from is None or len(prefix) <= free_from or goes_on:
                return
            if self._locks[prefix]:
                return
            self._free(prefix)


def _prefixes(tokens: Prefix) -> Iterator[Prefix]:
    return (tokens[:end] for end in range(1, len(tokens) + 1))
