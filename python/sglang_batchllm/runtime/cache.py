"""SGLang's radix cache, in which a planned batch holds its shared prefixes by pins."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from sglang_batchllm.request_ids import parse_request_id
from sglang_batchllm.runtime.batch import batch_of
from sglang_batchllm.runtime.held import HeldTexts

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def create_cache(context: TreeCacheBuildContext) -> PinnedGroupCache:
    """The factory behind ``--radix-cache-backend batchllm``."""
    return PinnedGroupCache(context.params)


class PinnedGroupCache(RadixCache):
    """A radix cache that also knows planned batches.

    Of a request in a batch that was handed over whole, only the prefix that others share enters
    the tree, as soon as it has slots; the batch pins it (`pin`), and `unpin` frees it at once
    after its last use. Its private suffix stays with the request and is freed when that ends, so
    nothing of such a batch is left to LRU. All other requests are cached as SGLang does.

    held: the texts of programs that go on, so that memory pressure between two turns does not
        evict what the next one needs.
    """

    def reset(self) -> None:
        super().reset()
        self.held = HeldTexts(self)

    def publish(self, req: Req) -> int:
        """Share the prompt tokens of `req` that have slots, although its pass has yet to run, and
        return their number.

        A later pass on the same stream finds them written, as with SGLang's chunked prefill.
        """
        self.cache_unfinished_req(req, chunked=True)
        assert req.extend_range is not None
        return req.extend_range.end

    def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
        planned = batch_of(req)
        if planned is None or not planned.batch.private:
            super().cache_unfinished_req(req, chunked=chunked)
            return
        assert req.extend_range is not None
        start, end = req.extend_range
        shared = min(planned.batch.pins.depth[planned.member.home], end)
        if planned.member.claimed and shared > req.cache_protected_len:
            req.set_extend_range(min(start, shared), shared)
            super().cache_unfinished_req(req, chunked=chunked)
            req.set_extend_range(start, end)
        if chunked:  # the next chunk starts where these end, in the tree or the request's own
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx, :end]
            req.prefix_indices = row.to(dtype=torch.int64, copy=True)

    def cache_finished_req(
        self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        """Also runs for a request that is retracted or aborted."""
        planned = batch_of(req)
        private = planned is not None and planned.batch.private
        last_node, depth = req.last_node, req.cache_protected_len
        super().cache_finished_req(
            req, is_insert=is_insert and not private, kv_len_to_handle=kv_len_to_handle
        )
        ended = req.finished() and not isinstance(req.finished_reason, FINISH_ABORT)
        asked = parse_request_id(req.rid)
        if asked is not None and asked.turn != "once" and ended and is_insert:
            text = (req.origin_input_ids + req.output_ids)[:kv_len_to_handle]
            self.held.hold(asked, text, req.extra_key)
        if planned is None:
            return
        if planned.member.claimed and private and last_node is not None:
            # An unfinished leader: what it published below the last whole node has no pin.
            self._free_upwards(last_node, depth, planned.member.matched)
        planned.batch.leave(planned.member, req)

    def lock(self, tokens: array, namespace: str | None) -> tuple[TreeNode, int]:
        """See `held.TextStore`."""
        node = self._match(tokens, namespace, len(tokens)).last_device_node
        before = self.protected_size()
        self.inc_lock_ref(node)
        return node, self.protected_size() - before

    def unlock(self, handle: TreeNode) -> None:
        """See `held.TextStore`."""
        self.dec_lock_ref(handle)

    def _match(self, tokens: array, namespace: str | None, limit: int) -> MatchResult:
        key = RadixKey(token_ids=tokens, extra_key=namespace, limit=limit)
        return self.match_prefix(MatchPrefixParams(key=key))

    def locked(self, tokens: array, namespace: str | None) -> int:
        """See `pins.PrefixStore`."""
        found = self._match(tokens, namespace, len(tokens) - 1)
        node, depth = found.last_device_node, len(found.device_indices)
        while node is not self.root_node and node.lock_ref == 0:
            depth -= len(node.key)
            node = node.parent
        return depth

    def pin(self, tokens: array, namespace: str | None, depth: int) -> TreeNode:
        """See `pins.PrefixStore`; the cached prefix must be there."""
        found = self._match(tokens, namespace, depth)
        cached = len(found.device_indices)
        assert cached == depth, f"prefix of {depth} tokens to pin, but only {cached} are cached"
        self.inc_lock_ref(found.last_device_node)
        return found.last_device_node

    def unpin(self, handle: TreeNode, depth: int, free_from: int | None) -> None:
        """See `pins.PrefixStore`."""
        self.dec_lock_ref(handle)
        if free_from is not None:
            self._free_upwards(handle, depth, free_from)

    def _free_upwards(self, node: TreeNode, depth: int, keep: int) -> None:
        """Free the KV of the path that ends in `node`, `depth` tokens deep, down to its first
        `keep` tokens or a node that is locked or has other continuations."""
        while depth > keep and node.lock_ref == 0 and not node.children:
            assert node.value is not None
            self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
            self._delete_leaf(node)
            self._record_remove_event(node)
            depth -= len(node.key)
            node = node.parent
