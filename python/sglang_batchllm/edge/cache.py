"""SGLang's prefix cache, in which a planned batch holds its shared prefixes by pins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sglang.srt.environ import Envs
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from sglang_batchllm.policy.batch import Member, member_of
from sglang_batchllm.policy.requests import End
from sglang_batchllm.policy.step import WindowPool

if TYPE_CHECKING:
    from sglang_batchllm.policy.core import BatchPolicy


class PinnedGroups(ABC):
    """What a cache with pinned groups does in every SGLang release. See `policy.store.Store`.

    Of a request in a batch that was handed over whole, only the prefix that others share enters
    the tree while it runs, as soon as it has slots; the batch pins it (`pin`), and `unpin` lets it
    go after its last use. Where memory is short what is left is freed then, and never met by LRU;
    where there is room it stays, with the request's own suffix and output, and is the first to be
    evicted. All other requests are cached as SGLang does.

    policy: told what gives its KV back; the scheduler sets it.
    in_chunks: requests whose prompts are prefilled in chunks, beside the one that SGLang has.
    """

    policy: BatchPolicy | None = None
    in_chunks: list[Req]

    # What is SGLang's
    page_size: Any
    sliding_window_size: Any
    supports_swa: Any
    swa_evictable_size: Any
    token_to_kv_pool_allocator: Any

    # What a release has to say

    @abstractmethod
    def publish(self, req: Req) -> int: ...

    @abstractmethod
    def match(self, tokens: array[int], namespace: str | None, limit: int) -> tuple[Any, int]:
        """Where the cached part of tokens[:limit] ends, and how many tokens that is."""

    @abstractmethod
    def hold(self, node: Any) -> tuple[Any, int]:
        """Keep a node and all above it; returns a handle and the tokens nobody else keeps."""

    @abstractmethod
    def let_go(self, handle: Any) -> Any:
        """The opposite; returns the node."""

    @abstractmethod
    def evict_first(self, node: Any) -> None:
        """Have the node, and those above it that nobody holds, evicted before all others."""

    @abstractmethod
    def free_upwards(self, node: Any, depth: int, keep: int) -> None:
        """Free the KV of the path that ends in `node`, `depth` tokens deep, down to its first
        `keep` tokens or a node that is held or has other continuations."""

    def reset(self) -> None:
        stock: Any = super()
        stock.reset()
        self.in_chunks = []
        if self.policy is not None:
            self.policy.forget_cached()

    # Layers that see only a window

    @cached_property
    def window(self) -> int | None:
        """Tokens, in whole pages, that a prefix needs in the pool of such layers; None without."""
        if not self.supports_swa():
            return None
        pages = -(-max(self.sliding_window_size, 1) // self.page_size)
        return pages * self.page_size

    def window_pool(self) -> WindowPool | None:
        if self.window is None:
            return None
        slack = max(Envs.SGLANG_SWA_EVICTION_INTERVAL.get(), 1) + self.page_size
        return WindowPool(self.window, self.token_to_kv_pool_allocator.size_swa, slack)

    def window_available(self) -> int:
        """Tokens of that pool that are free or can be evicted."""
        if self.window is None:
            return 0
        allocator = self.token_to_kv_pool_allocator
        return allocator.swa_available_size() + self.swa_evictable_size()

    def available(self) -> int:
        """Free tokens of the pool that all layers use, or those without a window."""
        allocator = self.token_to_kv_pool_allocator
        return (
            allocator.available_size() if self.window is None else allocator.full_available_size()
        )

    # Layers that keep a state

    def next_pass(self, req: Req) -> int | None:
        """Tokens that the request's next pass may prefill: to where its prompt leaves others, since
        the state there is to be kept, or to its end. None for any number, for models whose layers
        keep no state."""
        return None

    # What the policy asks

    def cached(self, tokens: array[int], namespace: str | None) -> int:
        return self.match(tokens, namespace, len(tokens))[1]

    def locked(self, tokens: array[int], namespace: str | None) -> int:
        node, depth = self.match(tokens, namespace, len(tokens) - 1)
        handle, loose = self.hold(node)
        self.let_go(handle)
        return depth - loose

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> Any:
        node, cached = self.match(tokens, namespace, depth)
        assert cached == depth, f"prefix of {depth} tokens to pin, but only {cached} are cached"
        return self.hold(node)[0]

    def unpin(self, handle: Any, depth: int, free_from: int | None, last_use: bool) -> None:
        node = self.let_go(handle)
        if free_from is not None:
            self.free_upwards(node, depth, free_from)
        elif last_use:
            self.evict_first(node)

    def hold_text(self, tokens: array[int], namespace: str | None) -> tuple[Any, int]:
        return self.hold(self.match(tokens, namespace, len(tokens))[0])

    def release_text(self, handle: Any) -> None:
        self.let_go(handle)

    # What a request leaves

    def keeps(self, req: Req) -> bool:
        """Whether what a request has computed stays in the tree once it has ended."""
        assert self.policy is not None
        return private_member(req) is None or self.policy.keeps(req)

    def left(self, req: Req, node: Any, depth: int, text: array[int] | None) -> None:
        """The request has given its KV back, ended or not. node, depth: where the part of it that
        the tree had ended. text: what the tree has now of it, None for no more."""
        assert self.policy is not None
        member = private_member(req)
        if member is not None:
            if text is not None and not (member.batch and member.batch.opening):
                self.evict_first(self.match(text, req.extra_key, len(text))[0])
            if member.claimed and node is not None:
                # An unfinished leader: what it published below the last whole node has no pin.
                self.free_upwards(node, depth, member.matched)
        self.policy.ended(req, _end_of(req), text)


def private_member(req: Req) -> Member | None:
    """The request's place in a batch that was handed over whole, if it has one."""
    member = member_of(req)
    whole = member is not None and member.batch is not None and member.batch.private
    return member if whole else None


def shared_tokens(req: Req, member: Member, end: int) -> int:
    """How many of the request's first `end` tokens, which have slots, others are to share."""
    assert member.batch is not None
    if member.batch.opening:
        return end
    return min(member.batch.pins.depth[member.home], end) if member.claimed else 0


def branches(req: Req) -> list[int]:
    """Prompt tokens of each shared prefix that the request is to compute, shortest first. Where
    prompts are equal, one may be no longer than what is there: the last token is not shared."""
    member = member_of(req)
    if member is None or member.batch is None:
        return []
    return [member.batch.pins.depth[node] for node in member.claimed]


def _end_of(req: Req) -> End | None:
    """How the request has ended; None for one that was retracted."""
    if not req.finished():
        return None
    if isinstance(req.finished_reason, FINISH_ABORT):
        return "abort"
    return "length" if isinstance(req.finished_reason, FINISH_LENGTH) else "stop"
