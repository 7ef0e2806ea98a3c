"""The prefix tree against a recursive split of the batch, and its shape in named cases."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning_references import batches, reference_tree, thorough
from sglang_batchllm.planning import plan_batch


@thorough
@given(batches(), st.sampled_from([1, 2, 4, 16]), st.data())
def test_tree_equals_recursive_split(
    prompts: list[list[int]], page_size: int, data: st.DataObject
) -> None:
    spaces = data.draw(
        st.none() | st.lists(st.sampled_from("ab"), min_size=len(prompts), max_size=len(prompts))
    )
    tree = plan_batch(prompts, page_size, namespaces=spaces).tree

    members: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for request, node in enumerate(tree.request_node.tolist()):
        while node >= 0:
            members[node].append(request)
            node = tree.parent[node]
    found = sorted(zip(tree.depth.tolist(), members, tree.end_count.tolist(), strict=True))
    expected = sorted(
        (node.depth, node.members, len(node.ends))
        for node in reference_tree(prompts, page_size, spaces).walk()
    )
    assert found == expected
    assert tree.num_requests.tolist() == [len(requests) for requests in members]
    assert tree.parent[0] == -1
    assert all(tree.parent[v] < v for v in range(tree.num_nodes))
    assert all(tree.depth[tree.parent[v]] < tree.depth[v] for v in range(1, tree.num_nodes))


def test_array_types() -> None:
    tree = plan_batch([[1, 2], [1, 3]]).tree
    assert tree.depth.dtype == np.int64
    for array in (tree.parent, tree.end_count, tree.num_requests, tree.request_node):
        assert array.dtype == np.int32


def test_prompt_that_is_a_prefix_of_another_ends_inside() -> None:
    tree = plan_batch([[5, 6, 7], [5, 6]]).tree
    assert tree.depth.tolist() == [0, 2, 3]
    assert tree.parent.tolist() == [-1, 0, 1]
    assert tree.request_node.tolist() == [2, 1]


@pytest.mark.parametrize(("length", "depths"), [(20, [0, 16, 20, 40]), (32, [0, 32, 40])])
def test_branches_are_whole_pages_and_ends_are_not(length: int, depths: list[int]) -> None:
    prompt = list(range(40))
    tree = plan_batch([prompt, prompt[:length]], page_size=16).tree
    assert sorted(tree.depth.tolist()) == depths
    assert tree.depth[tree.request_node].tolist() == [40, length]


def test_ten_thousand_levels_of_nesting() -> None:
    levels = 10_000
    text = np.arange(levels, dtype=np.int32)
    started = time.perf_counter()
    plan = plan_batch([text[:length] for length in range(levels, 0, -1)])
    assert time.perf_counter() - started < 5
    assert plan.tree.depth.tolist() == list(range(levels + 1))
    assert plan.order.tolist() == list(range(levels - 1, -1, -1))
    assert plan.to_compute.tolist() == [1] * levels
