"""SGLang's radix cache, and its unified one, which it uses for models with sliding windows."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.common import free_swa_out_of_window_slots
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_batchllm.edge.cache import PinnedGroups, private_member, shared_tokens
from sglang_batchllm.edge.unified import PathNode, RecurrentGroups, UnifiedGroups, WindowedGroups

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

LONG_AGO = 0.0
"""A time of last access before all others: what nobody needs is evicted first."""


def create_cache(context: TreeCacheBuildContext) -> PinnedGroups:
    """The factory behind ``--radix-cache-backend batchllm``."""
    if context.is_hybrid_ssm:
        context.params.tree_components = (ComponentType.FULL, ComponentType.MAMBA)
        return RecurrentGroupCache(context.params)
    if context.is_hybrid_swa:
        context.params.tree_components = (ComponentType.FULL, ComponentType.SWA)
        return WindowedGroupCache(context.params)
    return PinnedGroupCache(context.params)


KEPT_MATCHES = 64
"""Of pinned nodes; each has the slots of a whole path, 8 bytes a token, on the GPU."""


class _CachesRequests(PinnedGroups):
    """What requests leave in a cache of this release."""

    req_to_token_pool: Any

    def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
        stock: Any = super()
        member = private_member(req)
        if member is None:
            stock.cache_unfinished_req(req, chunked=chunked)
            return
        assert req.extend_range is not None
        start, end = req.extend_range
        shared = shared_tokens(req, member, end)
        if shared > req.cache_protected_len:
            req.set_extend_range(min(start, shared), shared)
            stock.cache_unfinished_req(req, chunked=chunked)
            req.set_extend_range(start, end)
        if chunked and len(req.prefix_indices) < end:
            # The next chunk starts where these end, in the tree or the request's own.
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx, :end]
            req.prefix_indices = row.to(dtype=torch.int64, copy=True)

    def enter(self, req: Req) -> int:
        self.cache_unfinished_req(req, chunked=True)
        assert req.extend_range is not None
        return req.extend_range.end


class PinnedGroupCache(_CachesRequests, RadixCache):
    def reset(self) -> None:
        self._matches: dict[TreeNode, MatchResult] = {}  # of nodes that are held
        super().reset()

    def publish(self, req: Req) -> int:
        """See `policy.store.Store`. The pass that computes them has yet to run: a later one on the
        same stream finds them written, as with SGLang's chunked prefill."""
        return self.enter(req)

    def cache_finished_req(
        self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        """Also runs for a request that is retracted or aborted."""
        is_insert = is_insert and self.keeps(req)
        last_node, depth = req.last_node, req.cache_protected_len
        if is_insert or last_node is None:
            super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)
        else:  # SGLang copies the slots of the whole text on the GPU first
            end = min(kv_len_to_handle, len(req.origin_input_ids) + len(req.output_ids))
            own = self.req_to_token_pool.req_to_token[req.req_pool_idx, depth:end]
            self.token_to_kv_pool_allocator.free_segment(own, start_pos=depth)
            self.dec_lock_ref(last_node)
        text = (req.origin_input_ids + req.output_ids)[:kv_len_to_handle] if is_insert else None
        self.left(req, last_node, depth, text)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """All requests at home in a pinned node match as much, unless the tree has more of them:
        SGLang would compare and copy the whole prefix for each."""
        node = self._pinned_home(params)
        if node is None:
            return super().match_prefix(params)
        if node not in self._matches:
            found = super().match_prefix(params)
            if found.last_device_node is not node:
                return found
            if len(self._matches) >= KEPT_MATCHES:
                self._matches.clear()
            self._matches[node] = found
        return self._matches[node]

    def _pinned_home(self, params: MatchPrefixParams) -> TreeNode | None:
        """Where the match ends, if that is known without looking."""
        member = None if params.req is None else private_member(params.req)
        if member is None or member.batch is None:
            return None
        pins = member.batch.pins
        node: TreeNode | None = pins.handle(member.home)
        if node is None:
            return None
        rest = params.key[pins.depth[member.home] :].page_aligned(self.page_size)
        goes_on = not len(rest) or rest.child_key(self.page_size) in node.children
        return None if goes_on else node

    # What `PinnedGroups` asks

    def match(self, tokens: array[int], namespace: str | None, limit: int) -> tuple[TreeNode, int]:
        key = RadixKey(token_ids=tokens, extra_key=namespace, limit=limit)
        found = self.match_prefix(MatchPrefixParams(key=key))
        return found.last_device_node, len(found.device_indices)

    def hold(self, node: TreeNode) -> tuple[TreeNode, int]:
        before = self.protected_size()
        self.inc_lock_ref(node)
        return node, self.protected_size() - before

    def let_go(self, handle: TreeNode) -> TreeNode:
        self._matches.pop(handle, None)
        self.dec_lock_ref(handle)
        return handle

    def evict_first(self, node: TreeNode) -> None:
        while node is not self.root_node and node.lock_ref == 0:
            node.last_access_time = LONG_AGO
            node = node.parent

    def free_upwards(self, node: TreeNode, depth: int, keep: int) -> None:
        while depth > keep and node.lock_ref == 0 and not node.children:
            assert node.value is not None
            self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
            self._delete_leaf(node)
            self._record_remove_event(node)
            depth -= len(node.key)
            node = node.parent


class _Lock(NamedTuple):
    node: int
    receipt: DecLockRefParams


class _UnifiedGroupCache(  # pyright: ignore[reportIncompatibleMethodOverride]
    UnifiedGroups, UnifiedRadixCache
):
    def cache_finished_req(
        self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int, **options: Any
    ) -> None:
        """Also runs for a request that is retracted or aborted."""
        is_insert = is_insert and self.keeps(req)
        last_node, depth = req.last_node, req.cache_protected_len
        super().cache_finished_req(
            req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle, **options
        )
        text = (req.origin_input_ids + req.output_ids)[:kv_len_to_handle] if is_insert else None
        self.left(req, last_node, depth, text)

    def reach(self, req: Req) -> tuple[int, int]:
        assert req.extend_range is not None
        return req.extend_range.end, req.cache_protected_len

    # What `PinnedGroups` asks

    def match(self, tokens: array[int], namespace: str | None, limit: int) -> tuple[int, int]:
        key = RadixKey(token_ids=tokens, extra_key=namespace, limit=limit)
        found = self.match_prefix(MatchPrefixParams(key=key))
        return found.last_device_node, len(found.device_indices)

    def hold(self, node: int) -> tuple[_Lock, int]:
        before = self.protected_size()
        receipt = self.inc_lock_ref(node).to_dec_params()
        return _Lock(node, receipt), self.protected_size() - before

    def let_go(self, handle: _Lock) -> int:
        self.dec_lock_ref(handle.node, handle.receipt)
        return handle.node

    def path_to(self, node: int) -> list[PathNode]:
        nodes = []
        place: Any = self.tree_core.node_by_id(node)
        while place is not self.root_node:
            nodes.append(place)
            place = place.parent
        path: list[PathNode] = []
        for place in reversed(nodes):
            start = path[-1].end if path else 0
            path.append(PathNode(place.id, start, start + len(place.key), len(place.children)))
        return path

    def free_leaf(self, node: int, freed: dict[Any, int]) -> None:
        self._evict_device_leaf(node, freed)


class WindowedGroupCache(  # pyright: ignore[reportIncompatibleMethodOverride]
    _CachesRequests, WindowedGroups, _UnifiedGroupCache
):
    """For models with sliding windows."""

    def slide(self, req: Req, to: int) -> None:
        free_swa_out_of_window_slots(
            req,
            to,
            sliding_window_size=self.sliding_window_size,
            page_size=self.page_size,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
        )


class RecurrentGroupCache(  # pyright: ignore[reportIncompatibleMethodOverride]
    RecurrentGroups, _UnifiedGroupCache
):
    """For models with layers that keep a state."""

    def cache_unfinished_req(self, req: Req, chunked: bool = False, **_: Any) -> None:
        if chunked:  # the next pass goes on from the request's own state
            assert req.extend_range is not None
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx, : req.extend_range.end]
            req.prefix_indices = row.to(dtype=torch.int64, copy=True)

    def enter_with_state(self, req: Req) -> None:
        super().cache_unfinished_req(req, chunked=True)

    def slot_of(self, req: Req) -> torch.Tensor:
        assert req.mamba_pool_idx is not None
        return req.mamba_pool_idx.view(1)

    def copy_states(self, sources: torch.Tensor, kept: torch.Tensor) -> None:
        self.req_to_token_pool.mamba_pool.copy_from(sources, kept)
