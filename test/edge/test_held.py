"""Texts that programs will continue stay locked between their turns."""

import time
from array import array
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.cache import PinnedGroups
from sglang_batchllm.policy.core import BatchPolicy
from sglang_batchllm.policy.requests import Turn
from sglang_batchllm.policy.step import Limits
from sglang_batchllm.policy.texts import ENOUGH_ENDED, HOLD_SECONDS, HeldTexts

BATCH = "a list"


class Allocator:
    """Counts what is freed."""

    device = "cpu"

    def __init__(self) -> None:
        self.freed = 0

    def free(self, slots: object) -> None:
        self.freed += len(slots)  # type: ignore[arg-type]

    def free_segment(self, slots: object, start_pos: int) -> None:
        self.free(slots)

    free_full_segment = free_segment


@pytest.fixture
def cache() -> Any:
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=None,  # type: ignore[arg-type]
        token_to_kv_pool_allocator=Allocator(),  # type: ignore[arg-type]
        page_size=1,
    )
    if hasattr(params, "tree_components"):
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        params.tree_components = (ComponentType.FULL,)
    cache = seams.load("cache").PinnedGroupCache(params)
    cache.policy = BatchPolicy(cache, Limits(10**6, 1, 8192, 0.0))
    return cache


def held(cache: PinnedGroups) -> HeldTexts:
    assert cache.policy is not None
    return cache.policy.texts


def finish(cache: Any, program: int, *tokens: int, turn: Any = "first") -> array:
    text = array("q", tokens)
    slots = torch.arange(len(text))
    cache.insert(InsertParams(key=RadixKey(text, None), value=slots))
    held(cache).hold(Turn(turn, BATCH, program), text, None)
    return text


def locked(cache: Any, text: array) -> int:
    return cache.locked(array("q", [*text, 99]), None)


def test_a_text_is_held_until_its_program_ends(cache: Any):
    held(cache).expect(BATCH)
    first = finish(cache, 7, 1, 2, 3, 4)
    longer = finish(cache, 7, 1, 2, 3, 4, 5, 6, turn="later")
    other = finish(cache, 8, 1, 2, 9)
    cache.evict(EvictParams(num_tokens=100))
    assert [locked(cache, text) for text in (first, longer, other)] == [4, 6, 3]
    assert held(cache).tokens == 7
    held(cache).release(BATCH, {7: True, 12: False})
    assert [locked(cache, text) for text in (first, longer, other)] == [2, 2, 3]
    cache.evict(EvictParams(num_tokens=100))
    held(cache).release(BATCH, None)
    assert not held(cache)
    assert held(cache).tokens == 0
    assert (cache.protected_size(), cache.evictable_size()) == (0, 3)


def test_nothing_is_held_for_a_client_that_is_gone(cache: Any):
    finish(cache, 1, 1, 2, 3)
    held(cache).expect(BATCH)
    finish(cache, 1, 1, 2, 3)
    held(cache).release(BATCH, None)
    finish(cache, 1, 1, 2, 3, 4, turn="later")
    assert not held(cache)
    assert cache.protected_size() == 0


def test_a_program_that_is_slow_loses_its_text_if_others_need_the_memory(
    cache: Any, monkeypatch: pytest.MonkeyPatch
):
    held(cache).expect(BATCH)
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    slow = finish(cache, 1, 1, 2, 3)
    clock += HOLD_SECONDS
    assert held(cache).num_expired() == 0
    quick = finish(cache, 2, 4, 5, 6)
    clock += HOLD_SECONDS / 2
    assert held(cache).num_expired() == 1
    held(cache).release_oldest(1)
    assert (locked(cache, slow), locked(cache, quick)) == (0, 3)


def test_programs_that_only_read_their_answer_are_found_out(cache: Any):
    held(cache).expect(BATCH)
    finish(cache, 100, 1, 2, 3)
    for program in range(ENOUGH_ENDED):
        assert held(cache).goes_on(BATCH)
        finish(cache, program, 4, program)
        held(cache).release(BATCH, {program: False})
    assert not held(cache).goes_on(BATCH)
    finish(cache, 101, 5, 6)
    finish(cache, 100, 1, 2, 3, 4, turn="later")
    assert held(cache).tokens == 4, "only of the program that turned out to go on"
    held(cache).release(BATCH, {100: True})
    assert not held(cache)


def test_a_few_programs_that_go_on_keep_the_others_held(cache: Any):
    held(cache).expect(BATCH)
    held(cache).release(BATCH, {program: program < 2 for program in range(2 * ENOUGH_ENDED)})
    assert held(cache).goes_on(BATCH)
    finish(cache, 50, 5, 6)
    assert held(cache).tokens == 2


def test_the_oldest_are_let_go_first(cache: Any):
    held(cache).expect(BATCH)
    older, newer = finish(cache, 1, 1, 2, 3), finish(cache, 2, 1, 2, 4)
    held(cache).release_oldest()
    assert (locked(cache, older), locked(cache, newer)) == (2, 3)
    held(cache).release(BATCH, {1: True})
    held(cache).release_oldest()
    assert not held(cache)
    assert cache.protected_size() == 0


def test_a_flushed_cache_holds_nothing(cache: Any):
    held(cache).expect(BATCH)
    finish(cache, 1, 1, 2, 3)
    cache.reset()
    assert not held(cache)
    held(cache).release(BATCH, {1: True})
    assert cache.evictable_size() == cache.protected_size() == 0
