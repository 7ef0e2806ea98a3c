"""The order of execution and what each request then computes."""

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planning_references import (
    batches,
    reference_order,
    reference_tree,
    simulate_cache,
    thorough,
)
from sglang_batchllm.planning import floor_to_page, plan_batch

PAGE_SIZES = st.sampled_from([1, 2, 4, 16])


@thorough
@given(batches(max_prompts=20), PAGE_SIZES, st.data())
def test_order_equals_recursive_order(
    prompts: list[list[int]], page_size: int, data: st.DataObject
) -> None:
    outputs = data.draw(st.lists(st.integers(0, 40), min_size=len(prompts), max_size=len(prompts)))
    plan = plan_batch(prompts, page_size, outputs)
    assert plan.order.tolist() == reference_order(reference_tree(prompts, page_size), outputs)


@thorough
@given(batches(max_prompts=30), PAGE_SIZES)
def test_every_subtree_is_contiguous(prompts: list[list[int]], page_size: int) -> None:
    plan = plan_batch(prompts, page_size)
    assert sorted(plan.order.tolist()) == list(range(len(prompts)))
    seen: dict[int, list[int]] = {}
    for position, request in enumerate(plan.order.tolist()):
        node = int(plan.tree.request_node[request])
        while node >= 0:
            seen.setdefault(node, []).append(position)
            node = int(plan.tree.parent[node])
    for positions in seen.values():
        assert positions == list(range(positions[0], positions[0] + len(positions)))


@thorough
@given(batches(max_prompts=20), PAGE_SIZES)
def test_to_compute_equals_a_simulated_cache(prompts: list[list[int]], page_size: int) -> None:
    plan = plan_batch(prompts, page_size)
    computed = simulate_cache(prompts, plan.order.tolist(), page_size)
    assert plan.to_compute.tolist() == [computed[i] for i in range(len(prompts))]


@thorough
@given(batches(max_prompts=20), PAGE_SIZES)
def test_total_is_distinct_tokens_and_one_tail_per_repeat(
    prompts: list[list[int]], page_size: int
) -> None:
    """Straight from the prompts: whole pages of which some prompt is beyond the end, once each,
    and for every prompt its last page, which nobody can take from the cache."""
    inner = {
        tuple(prompt[:end])
        for prompt in prompts
        for end in range(page_size, len(prompt), page_size)
    }
    ends = {tuple(prompt) for prompt in prompts}
    tails = sum(len(prompt) - floor_to_page(len(prompt) - 1, page_size) for prompt in prompts)
    total = page_size * len(inner - ends) + tails
    assert plan_batch(prompts, page_size).report.distinct_tokens == total


@thorough
@given(batches(max_prompts=5), PAGE_SIZES)
def test_no_order_computes_less(prompts: list[list[int]], page_size: int) -> None:
    least = min(
        sum(simulate_cache(prompts, order, page_size).values())
        for order in permutations(range(len(prompts)))
    )
    assert plan_batch(prompts, page_size).to_compute.sum() == least


@thorough
@given(batches(max_prompts=12), PAGE_SIZES)
def test_shared_len_is_the_longest_prefix_with_anyone(
    prompts: list[list[int]], page_size: int
) -> None:
    plan = plan_batch(prompts, page_size)
    for i, prompt in enumerate(prompts):
        longest = 0
        for j, other in enumerate(prompts):
            if i != j:
                length = min(len(prompt) - 1, len(other))
                while prompt[:length] != other[:length]:
                    length -= 1
                longest = max(longest, floor_to_page(length, page_size))
        assert plan.shared_len[i] == longest


def test_decoding_heavy_groups_go_first() -> None:
    prompts = [[1, 1, 1, 1, own] for own in range(3)] + [[2, 2, 2, 2, own] for own in range(3)]
    light, heavy = [0, 1, 2], [3, 4, 5]
    assert plan_batch(prompts, 1, [1] * 3 + [9] * 3).order.tolist() == heavy + light
    assert plan_batch(prompts, 1, [9] * 3 + [1] * 3).order.tolist() == light + heavy
    assert plan_batch(prompts).order.tolist() == light + heavy  # a tie goes by request index


def test_the_longest_output_starts_early() -> None:
    """A group with one long output goes before one that decodes more in all."""
    prompts = [[1, 1, own] for own in range(3)] + [[2, 2, own] for own in range(3)]
    assert plan_batch(prompts, 1, [8, 8, 8, 1, 9, 1]).order.tolist() == [4, 3, 5, 0, 1, 2]


def test_ratio_counts_a_shared_prefix_once() -> None:
    """Two requests of 10 + 1 tokens decode 2 per 12 distinct tokens, more than a lone request of
    8 tokens that decodes 1, although each alone has the smaller ratio."""
    prompts = [[7] * 8, [*[3] * 10, 1], [*[3] * 10, 2]]
    assert plan_batch(prompts).order.tolist() == [1, 2, 0]


def test_the_same_batch_gives_the_same_plan() -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(300)]
    one, other = plan_batch(prompts, 2), plan_batch([np.array(prompt) for prompt in prompts], 2)
    for name in ("order", "group_of", "shared_len", "to_compute"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert one.groups.node.tolist() == other.groups.node.tolist()
