"""Texts that will be continued stay locked between their turns, and not for long."""

from array import array

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_batchllm.runtime.cache import LINGER_STEPS, PinnedGroupCache


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


def finish(cache: PinnedGroupCache, *tokens: int) -> array:
    text = array("q", tokens)
    cache.insert(InsertParams(key=RadixKey(text, None)))
    cache._linger(text, None)
    return text


def test_a_text_is_kept_for_its_next_turn_and_then_left_to_eviction(cache: PinnedGroupCache):
    text = finish(cache, 1, 2, 3, 4)
    next_turn = array("q", [*text, 5, 6])
    for _ in range(LINGER_STEPS):
        assert cache.locked(next_turn, None) == 4
        cache.evict(EvictParams(num_tokens=4))
        assert not cache.advance()
    assert cache.advance()
    assert cache.locked(next_turn, None) == 0
    assert cache.evictable_size() == 4
    assert cache.lingering == 0


def test_the_oldest_are_let_go_first(cache: PinnedGroupCache):
    older, newer = finish(cache, 1, 2, 3), finish(cache, 1, 2, 4)
    cache.stop_lingering(1)
    assert cache.locked(array("q", [*older, 9]), None) == 2  # what both share
    assert cache.locked(array("q", [*newer, 9]), None) == 3
    cache.stop_lingering(5)
    assert cache.protected_size() == 0


def test_a_flushed_cache_holds_nothing(cache: PinnedGroupCache):
    finish(cache, 1, 2, 3)
    cache.reset()
    assert cache.lingering == 0
    cache.stop_lingering(1)
    assert cache.evictable_size() == cache.protected_size() == 0
