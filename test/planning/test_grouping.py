"""The choice of groups: exact on everything, and never worse than the local rule."""

import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from planning_references import (
    batches,
    best_savings,
    greedy_savings,
    group_savings,
    literal_dp,
    thorough,
)
from sglang_batchllm.planning import BatchPlan, PrefixTree, plan_batch
from sglang_batchllm.planning.grouping import choose_groups, usable_depth

PAGE_SIZES = st.sampled_from([1, 2, 4, 16])


def check_groups_are_consistent(plan: BatchPlan) -> None:
    """Group members are real, at least two, in the group's subtree and under no deeper group."""
    tree, groups = plan.tree, plan.groups
    group_at = dict(zip(groups.node.tolist(), range(len(groups.node)), strict=True))
    for request, node in enumerate(tree.request_node.tolist()):
        while node > 0 and node not in group_at:
            node = int(tree.parent[node])
        assert plan.group_of[request] == group_at.get(node, -1)
    assert 0 not in group_at
    assert (groups.size >= 2).all()
    members = plan.group_of[plan.group_of >= 0]
    assert np.bincount(members, minlength=len(groups.size)).tolist() == groups.size.tolist()
    assert (groups.prefix_len > 0).all()
    assert (groups.prefix_len % plan.page_size == 0).all()
    in_order = plan.group_of[plan.order]
    assert list(dict.fromkeys(in_order[in_order >= 0].tolist())) == list(range(len(groups.size)))


@thorough
@given(batches(), PAGE_SIZES)
def test_savings_equal_the_best_of_all_choices(prompts: list[list[int]], page_size: int) -> None:
    best = best_savings(prompts, page_size)
    assume(best is not None)
    plan = plan_batch(prompts, page_size)
    check_groups_are_consistent(plan)
    assert (group_savings(plan), plan.report.groups) == best


@thorough
@given(batches(max_prompts=60, max_len=9), PAGE_SIZES)
def test_savings_equal_the_literal_recurrence(prompts: list[list[int]], page_size: int) -> None:
    plan = plan_batch(prompts, page_size)
    usable = usable_depth(plan.tree, page_size).tolist()
    check_groups_are_consistent(plan)
    assert (group_savings(plan), plan.report.groups) == literal_dp(plan.tree, usable)
    assert group_savings(plan) >= greedy_savings(plan.tree, usable)


def random_tree(rng: np.random.Generator, num_nodes: int, bushy: float) -> PrefixTree:
    """A tree straight from arrays: `bushy` 0 is one long path, 1 hangs nodes anywhere."""
    parent = np.array([-1] + [v - 1 - int(bushy * rng.integers(0, v)) for v in range(1, num_nodes)])
    depth = np.zeros(num_nodes, np.int64)
    end_count = rng.integers(0, 4, num_nodes)
    end_count[0] = 0
    for node in range(1, num_nodes):
        depth[node] = depth[parent[node]] + rng.integers(1, 40)
    has_child = np.isin(np.arange(num_nodes), parent)
    end_count[~has_child] += 1
    num_requests = end_count.copy()
    for node in range(num_nodes - 1, 0, -1):
        num_requests[parent[node]] += num_requests[node]
    request_node = np.repeat(np.arange(num_nodes), end_count)
    return PrefixTree(parent, depth, end_count, num_requests, request_node)


def savings_of(tree: PrefixTree, group_node: np.ndarray, usable: list[int]) -> int:
    sizes = np.bincount(group_node[tree.request_node], minlength=tree.num_nodes)
    return sum((int(sizes[node]) - 1) * usable[node] for node in np.unique(group_node[1:]) if node)


@pytest.mark.parametrize("bushy", [0, 0.02, 0.2, 1])
@pytest.mark.parametrize("seed", range(5))
def test_large_random_trees(bushy: float, seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), 400, bushy)
    usable = usable_depth(tree, 1).tolist()
    group_node = choose_groups(tree, 1)
    saved = savings_of(tree, group_node, usable)
    groups = len(np.setdiff1d(group_node[tree.request_node], 0))
    assert (saved, groups) == literal_dp(tree, usable)
    assert saved >= greedy_savings(tree, usable)


def test_better_than_the_local_rule() -> None:
    """Four requests share ten tokens and two pairs of them share six more. Neither pair gains
    by leaving alone, 1 * 16 < 2 * 10, but both gain together, 16 + 16 > 3 * 10."""
    head = [0] * 10
    prompts = [[*head, *[pair] * 6, 10 + own] for pair in (1, 2) for own in range(2)]
    plan = plan_batch(prompts)
    assert greedy_savings(plan.tree, usable_depth(plan.tree, 1).tolist()) == 30
    assert group_savings(plan) == 32
    assert plan.group_of.tolist() == [0, 0, 1, 1]
    assert plan.groups.prefix_len.tolist() == [16, 16]


def test_equal_savings_give_fewer_groups() -> None:
    """As above, but pairs share five more tokens: 15 + 15 = 3 * 10."""
    prompts = [[*[0] * 10, *[pair] * 5, 10 + own] for pair in (1, 2) for own in range(2)]
    groups = plan_batch(prompts).groups
    assert groups.size.tolist() == [4]
    assert groups.prefix_len.tolist() == [10]


@pytest.mark.parametrize(
    ("length", "copies", "page_size", "shared"),
    [
        (10, 3, 1, 9),
        (20, 3, 16, 16),
        (32, 2, 16, 16),
        (33, 2, 16, 32),
        (16, 4, 16, 0),
        (1, 5, 1, 0),
    ],
)
def test_duplicates_share_all_but_the_last_token(
    length: int, copies: int, page_size: int, shared: int
) -> None:
    plan = plan_batch([list(range(length))] * copies, page_size)
    assert plan.groups.prefix_len.tolist() == ([shared] if shared else [])
    assert plan.groups.size.tolist() == ([copies] if shared else [])
    assert plan.group_of.tolist() == [0 if shared else -1] * copies
    assert plan.shared_len.tolist() == [shared] * copies
    assert plan.to_compute.tolist() == [length] + [length - shared] * (copies - 1)


def test_group_at_the_end_of_a_prompt_shares_the_whole_prompt() -> None:
    plan = plan_batch([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5]])
    assert plan.groups.prefix_len.tolist() == [3]
    assert plan.group_of.tolist() == [0, 0, 0]
    assert plan.shared_len.tolist() == [2, 3, 3]


def test_grouping_a_deep_tree_is_fast() -> None:
    tree = random_tree(np.random.default_rng(0), 50_000, 0)
    started = time.perf_counter()
    group_node = choose_groups(tree, 1)
    assert time.perf_counter() - started < 5
    usable = usable_depth(tree, 1).tolist()
    assert savings_of(tree, group_node, usable) >= greedy_savings(tree, usable)
