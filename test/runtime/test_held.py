"""Texts that programs will continue stay locked between their turns."""

import time
from array import array
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_batchllm.request_ids import RequestId, new_batch_id, parse_request_id
from sglang_batchllm.runtime.cache import PinnedGroupCache
from sglang_batchllm.runtime.held import ENOUGH_ENDED, HOLD_SECONDS

BATCH = new_batch_id()


class Allocator:
    """Counts what is freed."""

    device = "cpu"

    def __init__(self) -> None:
        self.freed = 0

    def free(self, slots: object) -> None:
        self.freed += len(slots)  # type: ignore[arg-type]

    def free_segment(self, slots: object, start_pos: int) -> None:
        self.free(slots)


@pytest.fixture
def cache() -> PinnedGroupCache:
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=None,  # type: ignore[arg-type]
        token_to_kv_pool_allocator=Allocator(),  # type: ignore[arg-type]
        page_size=1,
    )
    return PinnedGroupCache(params)


def finish(cache: PinnedGroupCache, program: int, *tokens: int, turn: Any = "first") -> array:
    text = array("q", tokens)
    cache.insert(InsertParams(key=RadixKey(text, None)))
    cache.held.hold(RequestId(turn, BATCH, program, 0), text, None)
    return text


def locked(cache: PinnedGroupCache, text: array) -> int:
    return cache.locked(array("q", [*text, 99]), None)


def test_a_text_is_held_until_its_program_ends(cache: PinnedGroupCache):
    cache.held.expect(BATCH)
    first = finish(cache, 7, 1, 2, 3, 4)
    longer = finish(cache, 7, 1, 2, 3, 4, 5, 6, turn="later")
    other = finish(cache, 8, 1, 2, 9)
    cache.evict(EvictParams(num_tokens=100))
    assert [locked(cache, text) for text in (first, longer, other)] == [4, 6, 3]
    assert cache.held.tokens == 7
    cache.held.release(BATCH, {7: True, 12: False})
    assert [locked(cache, text) for text in (first, longer, other)] == [2, 2, 3]
    cache.evict(EvictParams(num_tokens=100))
    cache.held.release(BATCH, None)
    assert not cache.held
    assert cache.held.tokens == 0
    assert (cache.protected_size(), cache.evictable_size()) == (0, 3)


def test_nothing_is_held_for_a_client_that_is_gone(cache: PinnedGroupCache):
    finish(cache, 1, 1, 2, 3)
    cache.held.expect(BATCH)
    finish(cache, 1, 1, 2, 3)
    cache.held.release(BATCH, None)
    finish(cache, 1, 1, 2, 3, 4, turn="later")
    assert not cache.held
    assert cache.protected_size() == 0


def test_a_program_that_is_slow_loses_its_text_if_others_need_the_memory(
    cache: PinnedGroupCache, monkeypatch: pytest.MonkeyPatch
):
    cache.held.expect(BATCH)
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    slow = finish(cache, 1, 1, 2, 3)
    clock += HOLD_SECONDS
    assert cache.held.num_expired() == 0
    quick = finish(cache, 2, 4, 5, 6)
    clock += HOLD_SECONDS / 2
    assert cache.held.num_expired() == 1
    cache.held.release_oldest(1)
    assert (locked(cache, slow), locked(cache, quick)) == (0, 3)


def test_programs_that_only_read_their_answer_are_found_out(cache: PinnedGroupCache):
    cache.held.expect(BATCH)
    finish(cache, 100, 1, 2, 3)
    for program in range(ENOUGH_ENDED):
        assert cache.held.goes_on(BATCH)
        finish(cache, program, 4, program)
        cache.held.release(BATCH, {program: False})
    assert not cache.held.goes_on(BATCH)
    finish(cache, 101, 5, 6)
    finish(cache, 100, 1, 2, 3, 4, turn="later")
    assert cache.held.tokens == 4, "only of the program that turned out to go on"
    cache.held.release(BATCH, {100: True})
    assert not cache.held


def test_a_few_programs_that_go_on_keep_the_others_held(cache: PinnedGroupCache):
    cache.held.expect(BATCH)
    cache.held.release(BATCH, {program: program < 2 for program in range(2 * ENOUGH_ENDED)})
    assert cache.held.goes_on(BATCH)
    finish(cache, 50, 5, 6)
    assert cache.held.tokens == 2


def test_the_oldest_are_let_go_first(cache: PinnedGroupCache):
    cache.held.expect(BATCH)
    older, newer = finish(cache, 1, 1, 2, 3), finish(cache, 2, 1, 2, 4)
    cache.held.release_oldest()
    assert (locked(cache, older), locked(cache, newer)) == (2, 3)
    cache.held.release(BATCH, {1: True})
    cache.held.release_oldest()
    assert not cache.held
    assert cache.protected_size() == 0


def test_a_flushed_cache_holds_nothing(cache: PinnedGroupCache):
    cache.held.expect(BATCH)
    finish(cache, 1, 1, 2, 3)
    cache.reset()
    assert not cache.held
    cache.held.release(BATCH, {1: True})
    assert cache.evictable_size() == cache.protected_size() == 0


def test_request_ids():
    for turn in ("once", "first", "later"):
        asked = RequestId(turn, BATCH, 12, 3)
        assert parse_request_id(str(asked)) == asked
    for rid in (None, "", "abc#out=12", f"batchllm-first-{BATCH}-1", f"x{asked}"):
        assert parse_request_id(rid) is None
