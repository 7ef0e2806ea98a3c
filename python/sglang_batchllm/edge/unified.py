"""What caches over SGLang's unified tree have in common: of the Python and the Rust tree, and of
every release. Nodes are numbers."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.environ import Envs
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.cache import PinnedGroups, branches, private_member
from sglang_batchllm.policy.step import WindowPool

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17.scheduler import computed
else:
    computed = seams.load("scheduler").computed


class PathNode(NamedTuple):
    """A node on the path from the root: its tokens from there, and the nodes that go on from it."""

    node: int
    start: int
    end: int
    children: int


class UnifiedGroups(PinnedGroups):
    """Frees at once, or before all else, what nobody needs."""

    components: Any

    def __init__(self, params: Any) -> None:
        self._first: dict[int, None] = {}  # nodes to evict before all others, oldest first
        super().__init__(params)  # type: ignore[call-arg]

    def reset(self) -> None:
        super().reset()
        self._first.clear()

    @abstractmethod
    def enter(self, req: Req) -> int:
        """See `policy.store.Store.publish`."""

    @abstractmethod
    def reach(self, req: Req) -> tuple[int, int]:
        """Prompt tokens of a request that have slots by now, and those of them in the tree."""

    @abstractmethod
    def path_to(self, node: int) -> Sequence[PathNode]: ...

    @abstractmethod
    def free_leaf(self, node: int, freed: dict[Any, int]) -> None:
        """Free the KV of a leaf that nobody holds, and count its tokens by component."""

    # What the policy asks

    def publish(self, req: Req) -> int:
        """The pass that computes them has yet to run: a later one on the same stream finds them
        written, as with SGLang's chunked prefill."""
        return self.enter(req)

    # What `PinnedGroups` asks

    def evict_first(self, node: int) -> None:
        for one in self._loose_path(node):
            self._first.pop(one.node, None)
            self._first[one.node] = None

    def free_upwards(self, node: int, depth: int, keep: int) -> None:
        for one in self._loose_path(node):
            children = one.children - (one.end < depth)  # the last was freed before
            if one.end <= keep or children:
                return
            self._free_leaf(one.node)

    def _loose_path(self, node: int) -> Iterator[PathNode]:
        """The nodes from this one upwards that nobody holds."""
        path = self.path_to(node)
        if path:
            handle, loose = self.hold(node)
            self.let_go(handle)
            held = path[-1].end - loose
            yield from (one for one in reversed(path) if one.start >= held)

    def _free_leaf(self, node: int) -> dict[Any, int]:
        self._first.pop(node, None)
        freed = dict.fromkeys(self.components, 0)
        self.free_leaf(node, freed)
        return freed

    # Eviction

    def evict(self, params: EvictParams) -> EvictResult:
        freed = self.evict_first_ones(params)
        rest: EvictResult = super().evict(less(freed, params))  # type: ignore[misc]
        return plus(freed, rest)

    def evict_first_ones(self, params: EvictParams) -> EvictResult:
        """Free leaves that nobody needs until there is enough."""
        done = EvictResult()
        while self._first and (
            done.num_tokens_evicted < params.num_tokens
            or done.swa_num_tokens_evicted < params.swa_num_tokens
        ):
            node = next(iter(self._first))
            del self._first[node]
            try:
                loose = next(self._loose_path(node), None)
            except KeyError:
                continue  # evicted already
            if loose is not None and not loose.children:
                freed = self._free_leaf(node)
                of_windows = freed.get(ComponentType.SWA, 0)
                done = plus(done, EvictResult(freed[ComponentType.FULL], of_windows))
        return done


class WindowedGroups(UnifiedGroups):
    """Where layers have windows: pins no more of their pool than the window before a prefix's end.

    moved: since it was last looked at, a request's slots became others, which the tree had for the
    same tokens; its pass has yet to be launched, and has to write there.
    """

    match_prefix: Any

    moved = False

    @abstractmethod
    def slide(self, req: Req, to: int) -> None:
        """Free what the request, whose next token to see a window is number `to`, has left behind
        of the pool of such layers and no tree holds."""

    def publish(self, req: Req) -> int:
        if self.window is None:
            return super().publish(req)
        reached, in_tree = self.reach(req)
        key = RadixKey(
            token_ids=req.full_untruncated_fill_ids, extra_key=req.extra_key, limit=reached
        )
        there = self.match_prefix(MatchPrefixParams(key=key)).full_kv_hit_length
        self.moved |= there > in_tree
        # The pass reads windows from its first token on.
        with Envs.SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS.override(False):
            return super().publish(req)

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> Any:
        if self.window is not None and depth > self.window:
            # A match cuts the tree where it ends, and a lock holds whole nodes.
            self.match(tokens, namespace, depth - self.window)
        return super().pin(tokens, namespace, depth)


class RecurrentGroups(UnifiedGroups):
    """Where layers keep a state. A node has one only where a pass has ended; so of requests that
    run nothing enters the tree but shared prefixes, each with a pass to its end. What the
    requests of a list leave would need states, too, and nobody is known to go on from there."""

    req_to_token_pool: Any
    mamba_evictable_size: Any
    tree_core: Any

    def reset(self) -> None:
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().reset()

    @abstractmethod
    def enter_with_state(self, req: Req) -> None:
        """Have the tree take what has slots of the request, and copy its state."""

    @abstractmethod
    def slot_of(self, req: Req) -> torch.Tensor:
        """The slot of the request's state, of shape [1]."""

    @abstractmethod
    def copy_states(self, sources: torch.Tensor, kept: torch.Tensor) -> None:
        """From slots to slots, as many."""

    def window_pool(self) -> WindowPool:
        slots = self.req_to_token_pool.mamba_pool.size
        return WindowPool(1, slots, slack=0, recurrent=True)

    def window_available(self) -> int:
        free: int = self.req_to_token_pool.mamba_allocator.available_size()
        return free + self.mamba_evictable_size()

    def keeps(self, req: Req) -> bool:
        return private_member(req) is None and super().keeps(req)

    def next_pass(self, req: Req) -> int:
        done, end = computed(req), len(req.full_untruncated_fill_ids)
        return next((branch for branch in branches(req) if branch > done), end) - done

    def enter(self, req: Req) -> int:
        end, in_tree = self.reach(req)
        if end not in branches(req):
            return in_tree
        with _without_copying(self.req_to_token_pool.mamba_pool):
            self.enter_with_state(req)
        kept = self.tree_core.get_component_device_value(req.last_node, ComponentType.MAMBA)
        assert kept is not None
        self._states.append((self.slot_of(req), kept))
        return end

    def keep_states(self) -> None:
        """The pass has run: the states after prefixes that were published before it are there."""
        if self._states:
            for one in chain.from_iterable(self._states):
                if one.is_cuda:  # made on the scheduler's stream
                    one.record_stream(torch.cuda.current_stream())
            sources, kept = map(torch.cat, zip(*self._states, strict=True))
            self.copy_states(sources, kept)
            self._states.clear()


@contextmanager
def _without_copying(states: Any) -> Iterator[None]:
    """Slots are taken and nothing is copied to them: the pass has yet to compute it, and the step
    before may still run."""
    states.copy_from = lambda *_: None
    try:
        yield
    finally:
        del states.copy_from


def less(freed: EvictResult, params: EvictParams) -> EvictParams:
    return replace(
        params,
        num_tokens=max(params.num_tokens - freed.num_tokens_evicted, 0),
        swa_num_tokens=max(params.swa_num_tokens - freed.swa_num_tokens_evicted, 0),
    )


def plus(freed: EvictResult, result: EvictResult) -> EvictResult:
    return replace(
        result,
        num_tokens_evicted=result.num_tokens_evicted + freed.num_tokens_evicted,
        swa_num_tokens_evicted=result.swa_num_tokens_evicted + freed.swa_num_tokens_evicted,
    )
