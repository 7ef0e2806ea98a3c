"""SGLang's unified radix cache, whose tree may be Python's or Rust's: nodes are numbers."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    TreeLock,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_batchllm.edge.cache import private_member, shared_tokens
from sglang_batchllm.edge.unified import (
    PathNode,
    RecurrentGroups,
    UnifiedGroups,
    WindowedGroups,
    less,
    plus,
)

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_cache(context: TreeCacheBuildContext) -> Any:
    """The factory behind ``--radix-cache-backend batchllm``."""
    kind = RecurrentGroupCache if context.is_hybrid_ssm else PinnedGroupCache
    return create_unified_radix_cache(context, cache_class=kind)


class _UnifiedGroupCache(UnifiedGroups, UnifiedRadixCache):
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

    def reach(self, req: Req) -> tuple[int, int]:
        assert req.extend_end is not None
        return req.extend_end, req.kv.cache_protected_len

    def path_to(self, node: int) -> list[PathNode]:
        (path,) = self.tree_core.collect_path_info([node])
        return [
            PathNode(one.node_id, one.path_start, one.path_end, one.num_children) for one in path
        ]

    def free_leaf(self, node: int, freed: dict[Any, int]) -> None:
        self._evict_device_leaf(node, freed)

    def evict_for_alloc(self, params: EvictParams, **options: Any) -> EvictResult:
        freed = self.evict_first_ones(params)
        return plus(freed, super().evict_for_alloc(less(freed, params), **options))


class PinnedGroupCache(WindowedGroups, _UnifiedGroupCache):
    def enter(self, req: Req) -> int:
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

    def slide(self, req: Req, to: int) -> None:
        self.evict_sliding_windows(req, to)


class RecurrentGroupCache(RecurrentGroups, _UnifiedGroupCache):
    """For models with layers that keep a state."""

    def checkpoint(self, req: Req, *, up_to: int, **options: Any) -> None:
        """Of one that has ended and is not kept, nothing enters, but SGLang frees its state."""
        if req.finished():
            super().checkpoint(req, up_to=up_to if self.keeps(req) else 0, **options)

    def enter_with_state(self, req: Req) -> None:
        assert req.extend_end is not None
        super().checkpoint(req, up_to=req.extend_end)

    def slot_of(self, req: Req) -> torch.Tensor:
        assert req.kv.mamba_pool_idx is not None
        return req.kv.mamba_pool_idx.view(1)

    def copy_states(self, sources: torch.Tensor, kept: torch.Tensor) -> None:
        place = self.req_to_token_pool.translate_mamba_indices
        self.req_to_token_pool.mamba_pool.copy_from(place(sources), place(kept))
