"""Which shared nodes attention is told of."""

from __future__ import annotations

import itertools
import random
from typing import Any

from sglang_batchllm.attention import groups
from sglang_batchllm.planning import plan_batch
from sglang_batchllm.policy.paths import LEAST_SAVED, LEVELS, SharedPaths
from sglang_batchllm.policy.pins import PinnedTree


def paths_of(prompts: list[list[int]]) -> tuple[SharedPaths, PinnedTree]:
    plan = plan_batch(prompts)
    store: Any = None  # nothing is pinned
    pins = PinnedTree(plan, store, lambda tokens, kept: None)
    return SharedPaths(plan, pins), pins


def test_attention_has_room_for_every_level() -> None:
    assert groups.LEVELS == LEVELS


def test_requests_name_the_same_nodes_down_to_where_they_part() -> None:
    system, documents = [1] * 300, [[2] * 300, [3] * 300]
    prompts = [system + document + [9, i] for document in documents for i in range(4)]
    prompts.append([*system, 7])
    paths, pins = paths_of(prompts)
    found = [paths.of(home, 10**6) for home in pins.home]
    assert [[end for _, end in path] for path in found] == [[300, 601]] * 8 + [[300]]
    names = [[name for name, _ in path] for path in found]
    assert (
        len({tuple(name) for name in names[:4]}) == len({tuple(name) for name in names[4:8]}) == 1
    )
    assert len({name[0] for name in names}) == 1
    assert names[0][1] != names[4][1]
    # Who has other slots for the last token of the document shares the system prompt alone.
    assert paths.of(pins.home[0], 600) == found[8]


def test_what_was_given_up_and_computed_again_is_another() -> None:
    paths, pins = paths_of([[1] * 300 + [i] for i in range(3)])
    (before,) = paths.of(pins.home[0], 300)
    pins.times_relaxed += 1
    (after,) = paths.of(pins.home[0], 300)
    assert before[0] != after[0] and before[1] == after[1] == 300


def test_of_deep_trees_those_that_save_enough_are_named() -> None:
    rng = random.Random(0)
    prompts: list[list[int]] = []
    stem: list[int] = []
    for level in range(40):
        stem = stem + [level] * rng.choice([1, 40, 200])
        prompts += [[*stem, 1000 + level, i] for i in range(rng.choice([1, 2]))]
    paths, pins = paths_of(prompts)
    plan = plan_batch(prompts)
    for index, home in enumerate(pins.home):
        path = paths.of(home, 10**6)
        ends = [end for _, end in path]
        assert ends == sorted(set(ends)) and len(ends) <= LEVELS
        group = plan.group_of[index]
        if group >= 0:  # the planner's choice is among them, or so little above it that
            best = int(plan.groups.prefix_len[group])  # it saves next to nothing more
            others = int(plan.tree.num_requests[plan.groups.node[group]]) - 1
            assert any(0 <= others * (best - end) < LEAST_SAVED for end in [0, *ends])
    for one, other in itertools.combinations(range(0, len(prompts), 5), 2):
        shared = [
            a == b
            for a, b in zip(
                paths.of(pins.home[one], 10**6), paths.of(pins.home[other], 10**6), strict=False
            )
        ]
        assert shared == sorted(shared, reverse=True)  # the same up to where they part
