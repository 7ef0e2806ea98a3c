"""Where some layers see only a window: what is forecast of their pool, and what is pinned in it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prompts import computed_tokens
from sglang_batchllm.planning import plan_batch
from sglang_batchllm.policy.admission.state_slots import StateSlots
from sglang_batchllm.policy.admission.window_forecast import WindowForecast
from sglang_batchllm.policy.pins import ROOT
from sglang_batchllm.policy.step import WindowPool
from sglang_batchllm.policy.windowed import MOST_PINNED, WindowedTree

WINDOW, SLACK = 4, 2
MOST = WINDOW + SLACK

requests = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6)


def peak(running: list[tuple[int, int]]) -> int:
    """Tokens in the pool at most, step by step: each request holds what it has and decodes up to
    its window and the slack, and gives it back at its end."""
    last = max(steps for _, steps in running)
    return max(
        sum(min(held + step, MOST) for held, steps in running if steps >= step)
        for step in range(last + 1)
    )


@given(
    running=requests, held=st.integers(1, MOST), steps=st.integers(1, 12), room=st.integers(0, 9)
)
def test_a_request_is_admitted_if_the_pool_holds_all_to_the_end(
    running: list[tuple[int, int]], held: int, steps: int, room: int
) -> None:
    running = [(min(one, MOST), left) for one, left in running]
    used = sum(one for one, _ in running)
    most = peak([*running, (held, steps)])
    capacity = most - 3 + room
    forecast = WindowForecast(WindowPool(WINDOW, capacity, SLACK), used, pinned=0)
    columns = np.array(running, float)
    forecast.add_running(columns[:, 0], columns[:, 1])
    assert forecast.admit(held, steps) == (most <= capacity)


def test_a_long_prompt_is_charged_for_what_passes_through_only_until_that_is_given_back() -> None:
    pool = WindowPool(WINDOW, 24, SLACK)
    forecast = WindowForecast(pool, 0, pinned=0)
    assert forecast.admit(100, 50)  # 6 tokens to its end, and 6 more for 2 steps
    assert forecast.admit(WINDOW, 1)
    assert forecast.admit(MOST, 50)
    assert not forecast.admit(MOST, 50)


def test_pins_leave_room_for_the_largest_request() -> None:
    forecast = WindowForecast(WindowPool(WINDOW, 20, SLACK), 0, pinned=6)
    assert forecast.may_pin(8, largest=100)
    assert not forecast.may_pin(1, largest=100)
    assert forecast.may_pin(1, largest=5)


def slots(free: int = 10, claimed: int = 0, pinned: int = 0) -> StateSlots:
    """Of ten, one of which runs already."""
    slots = StateSlots(10, free, claimed, pinned)
    slots.add_running(np.ones(1), np.ones(1))
    return slots


def test_a_request_takes_one_state_however_long_it_is_and_decodes() -> None:
    one = slots(free=3)
    assert one.admit(1000, 50)
    assert one.admit(10, 50, prefix=1)
    assert not one.admit(10, 50)


def test_states_of_prefixes_are_in_the_way_of_what_begins_now_alone() -> None:
    one = slots(free=4, claimed=1, pinned=2)
    assert one.admit(10, 50, prefix=2)  # all that are free
    assert one.set_aside(100, 50, 5)  # when four and the two of prefixes are
    assert not one.set_aside(10, 50, 1)
    assert not slots(free=4, claimed=2).admit(10, 50, prefix=2)


def test_states_of_prefixes_leave_one_for_a_request() -> None:
    one = slots(pinned=6)
    assert one.may_pin(3, largest=1000)
    assert not one.may_pin(1, largest=1000)


def test_the_first_request_needs_one_slot_whatever_it_pins() -> None:
    assert StateSlots(10, free=1, claimed=0, pinned=9).admit(10, 50, prefix=3)
    assert not StateSlots(10, free=1, claimed=1, pinned=9).admit(10, 50)


@dataclass
class Prompt:
    origin_input_ids: array[int]
    extra_key: str | None = None


@dataclass(eq=False)
class Member:
    request: Any
    home: int
    claimed: list[int] = field(default_factory=list)
    matched: int = 0
    ask: None = None
    lead: None = None


class Store:
    """Remembers the depths that are pinned; `whole` are those that one can go on from."""

    def __init__(self) -> None:
        self.pinned: list[int] = []
        self.whole: set[int] = set()

    def pin(self, tokens: array[int], namespace: str | None, depth: int) -> int:
        self.pinned.append(depth)
        return depth

    def unpin(self, handle: int, depth: int, free_from: int | None, last_use: bool) -> None:
        self.pinned.remove(depth)

    def cached(self, tokens: array[int], namespace: str | None) -> int:
        return max((depth for depth in self.whole if depth <= len(tokens)), default=0)

    def locked(self, tokens: array[int], namespace: str | None) -> int:
        return 0

    def publish(self, request: Any, /) -> int:
        raise NotImplementedError

    def hold_text(self, tokens: array[int], namespace: str | None) -> tuple[Any, int]:
        raise NotImplementedError

    def release_text(self, handle: Any) -> None:
        raise NotImplementedError


def chain_of(capacity: int) -> tuple[WindowedTree, Store, list[Member], list[int]]:
    """Two requests at home at depth 10, two at depth 30; and the sum of what was counted."""
    text = [*range(100, 130)]
    prompts = [[*text[:10], 1], [*text[:10], 2], [*text, 1], [*text, 2]]
    arrays = [array("q", prompt) for prompt in prompts]
    plan = plan_batch(arrays, 1, np.ones(4, np.int64), namespaces=[None] * 4)
    store, counted = Store(), [0]

    def count(tokens: int, in_windows: int) -> None:
        counted[0] += in_windows

    tree = WindowedTree(plan, store, count, WindowPool(WINDOW, capacity, SLACK))
    members = [Member(Prompt(one), tree.home[index]) for index, one in enumerate(arrays)]
    return tree, store, members, counted


prompts_alike = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=2, max_size=30
)


@given(prompts=prompts_alike, least_saved=st.integers(0, 12))
def test_what_a_prefix_adds_and_saves_little_belongs_to_those_below(
    prompts: list[list[int]], least_saved: int
) -> None:
    arrays = [array("q", prompt) for prompt in prompts]
    plan = plan_batch(arrays, 1, np.ones(len(arrays), np.int64), namespaces=[None] * len(arrays))
    pool = WindowPool(1, 100, slack=0, recurrent=True)
    tree = WindowedTree(plan, Store(), lambda *_: None, pool, least_saved)
    nodes: set[int] = set()
    for node in tree.home:
        while node != ROOT and node not in nodes:
            nodes.add(node)
            node = tree.parent[node]
    once = sum(tree.depth[node] - tree.depth[tree.parent[node]] for node in nodes)
    own = [
        max(len(prompt) - tree.depth[home], 1)
        for prompt, home in zip(prompts, tree.home, strict=True)
    ]
    leading = {
        tuple(prompt)
        for prompt, home in zip(prompts, tree.home, strict=True)
        if home != ROOT and tree.depth[home] == len(prompt)
    }
    assert once + sum(own) - len(leading) == computed_tokens(prompts, least_saved)


def test_a_prefix_is_pinned_for_as_long_as_a_request_may_begin_at_its_end() -> None:
    tree, store, (first, second, third, fourth), counted = chain_of(1000)
    tree.claim(third)
    tree.publish(third, 31)
    assert sorted(store.pinned) == [10, 30]
    assert counted == [2 * WINDOW]
    tree.finish(first, free=True, last_use=True)
    assert sorted(store.pinned) == [10, 30]
    tree.finish(second, free=True, last_use=True)
    assert store.pinned == [30], "what goes on below holds the rest for the other layers"
    assert counted == [WINDOW]
    assert tree.pinned_tokens == 30
    tree.finish(third, free=True, last_use=True)
    tree.finish(fourth, free=True, last_use=True)
    assert (store.pinned, counted, tree.pinned_tokens) == ([], [0], 0)


def test_a_node_below_that_is_not_ready_begins_at_the_prefix_too() -> None:
    tree, store, (first, second, third, fourth), counted = chain_of(1000)
    tree.claim(first)
    tree.publish(first, 11)
    for one in (first, second):
        tree.finish(one, free=True, last_use=True)
    assert store.pinned == [10]
    tree.claim(third)
    assert tree.computes_from(third) == 10
    tree.publish(third, 31)
    assert store.pinned == [30]
    for one in (third, fourth):
        tree.finish(one, free=True, last_use=True)
    assert (store.pinned, counted) == ([], [0])


def test_what_half_the_pool_does_not_hold_is_computed_again() -> None:
    tree, store, members, counted = chain_of(MOST_PINNED * WINDOW)
    tree.claim(members[2])
    tree.publish(members[2], 31)
    assert store.pinned == [30]
    assert not tree.is_ready(tree.home[0])
    tree.claim(members[0])
    assert tree.computes_from(members[0]) == 0
    for one in members:
        tree.finish(one, free=True, last_use=True)
    assert (store.pinned, counted, tree.pinned_tokens) == ([], [0], 0)


def test_a_cached_prefix_counts_down_to_where_windows_are_missing() -> None:
    tree, store, members, _ = chain_of(1000)
    store.whole = {30}
    tree.claim(members[2])
    tree.adopt(members[2])
    assert store.pinned == []
    assert tree.computes_from(members[2]) == 0
    store.whole = {10, 30}
    tree.adopt(members[2])
    assert sorted(store.pinned) == [10, 30]


def test_relaxing_gives_up_a_members_own_path_too() -> None:
    tree, store, members, counted = chain_of(1000)
    tree.claim(members[2])
    tree.publish(members[2], 31)
    tree.relax(members[3])
    assert (store.pinned, counted, tree.pinned_tokens) == ([], [0], 0)
    tree.claim(members[3])
    tree.publish(members[3], 31)
    assert sorted(store.pinned) == [10, 30]
    for one in members:
        tree.finish(one, free=True, last_use=True)
    assert (store.pinned, counted, tree.pinned_tokens) == ([], [0], 0)
