"""SGLang's unified radix cache, whose tree may be Python's or Rust's: nodes are numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    TreeLock,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import TreePathNodeInfo
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_batchllm.edge.cache import PinnedGroups, private_member, shared_tokens

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_cache(context: TreeCacheBuildContext) -> Any:
    """The factory behind ``--radix-cache-backend batchllm``."""
    return create_unified_radix_cache(context, cache_class=PinnedGroupCache)


class PinnedGroupCache(PinnedGroups, UnifiedRadixCache):
    def __init__(self, params: Any) -> None:
        self._first: dict[int, None] = {}  # nodes to evict before all others, oldest first
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self._first.clear()
        if self.policy is not None:
            self.policy.forget_cached()

    def publish(self, req: Req) -> int:
        """See `policy.store.Store`. The pass that computes them has yet to run: a later one on the
        same stream finds them written, as with SGLang's chunked prefill."""
        assert req.extend_end is not None
        self.checkpoint(req, up_to=req.extend_end)
        return req.extend_end

    def checkpoint(self, req: Req, *, up_to: int, **options: Any) -> None:
        """Also runs for a request that has ended by itself, just before its KV is released."""
        member = private_member(req)
        if member is not None and not (req.finished() and self.keeps(req)):
            up_to = 0 if req.finished() else shared_tokens(req, member, up_to)
            if up_to <= req.kv.cache_protected_len:
                return
        super().checkpoint(req, up_to=up_to, **options)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """Also runs for a request that is retracted or aborted."""
        super().on_release(req, checkpointed=checkpointed)
        text = None
        if checkpointed and self.keeps(req):
            text = (req.origin_input_ids + req.output_ids)[: req.owned_kv_len()]
        self.left(req, req.last_node, req.kv.cache_protected_len, text)

    # What `PinnedGroups` asks

    def match(self, tokens: array[int], namespace: str | None, limit: int) -> tuple[int, int]:
        key = RadixKey(token_ids=tokens, extra_key=namespace, limit=limit)
        found = self.match_prefix(MatchPrefixParams(key=key))
        return found.last_device_node, found.device_prefix_len

    def hold(self, node: int) -> tuple[TreeLock | None, int]:
        before = self.protected_size()
        lock = self.lock(node)
        return lock, self.protected_size() - before

    def let_go(self, handle: TreeLock) -> int:
        self.unlock(handle)
        return handle.node

    def evict_first(self, node: int) -> None:
        for one in self._loose_path(node):
            self._first.pop(one.node_id, None)
            self._first[one.node_id] = None

    def free_upwards(self, node: int, depth: int, keep: int) -> None:
        for one in self._loose_path(node):
            children = one.num_children - (one.path_end < depth)  # the last was freed before
            if one.path_end <= keep or children:
                return
            self._free_leaf(one.node_id)

    def _loose_path(self, node: int) -> Iterator[TreePathNodeInfo]:
        """The nodes from this one upwards that nobody holds."""
        (path,) = self.tree_core.collect_path_info([node])
        if path:
            lock, loose = self.hold(node)
            self.unlock(lock)
            held = path[-1].path_end - loose
            yield from (one for one in reversed(path) if one.path_start >= held)

    def _free_leaf(self, node: int) -> None:
        self._first.pop(node, None)
        self._evict_device_leaf(node, dict.fromkeys(self.components, 0))

    # Eviction

    def evict(self, params: EvictParams) -> EvictResult:
        freed = self._evict_first_ones(params.num_tokens)
        return _plus(freed, super().evict(_less(freed, params)))

    def evict_for_alloc(self, params: EvictParams, **options: Any) -> EvictResult:
        freed = self._evict_first_ones(params.num_tokens)
        return _plus(freed, super().evict_for_alloc(_less(freed, params), **options))

    def _evict_first_ones(self, tokens: int) -> int:
        """Free leaves that nobody needs until that many tokens are; returns how many were."""
        freed = 0
        while self._first and freed < tokens:
            node = next(iter(self._first))
            del self._first[node]
            try:
                loose = next(self._loose_path(node), None)
            except KeyError:
                continue  # evicted already
            if loose is not None and not loose.num_children:
                self._free_leaf(node)
                freed += loose.path_end - loose.path_start
        return freed


def _less(freed: int, params: EvictParams) -> EvictParams:
    return replace(params, num_tokens=max(params.num_tokens - freed, 0))


def _plus(freed: int, result: EvictResult) -> EvictResult:
    return replace(result, num_tokens_evicted=result.num_tokens_evicted + freed)
