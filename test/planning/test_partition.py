"""Requests on several shards: what is computed where, and how close to the bound."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches import CASES
from planning_references import batches, thorough
from sglang_batchllm.planning import Costs, evaluate, partition, plan_batch

TOKENS = Costs(prefill_token=1.0, pair=0.0, decode_token=1.0, kv_token=0.0)
"""A second for each token, computed or decoded."""


def tokens_of(prompts: list[list[int]]) -> int:
    return len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


def seconds_of(prompts: list[list[int]], outputs: list[int], shard_of: list[int]) -> list[int]:
    """By the costs of `TOKENS`."""
    return [
        tokens_of([prompt for prompt, of in zip(prompts, shard_of, strict=True) if of == shard])
        + sum(output for output, of in zip(outputs, shard_of, strict=True) if of == shard)
        for shard in range(max(shard_of, default=0) + 1)
    ]


@thorough
@given(batches(max_prompts=30), st.integers(1, 6), st.integers(0, 2**32))
def test_the_partition_says_what_each_shard_computes(
    prompts: list[list[int]], shards: int, seed: int
) -> None:
    outputs = np.random.default_rng(seed).integers(0, 9, len(prompts))
    plan = plan_batch(prompts, 1, outputs)
    found = partition(plan, shards, outputs, TOKENS)
    shard_of = found.shard_of.tolist()
    assert len(shard_of) == len(prompts)
    for shard in range(shards):
        mine = [prompts[index] for index, of in enumerate(shard_of) if of == shard]
        assert found.computed_tokens[shard] == tokens_of(mine)
    seconds = seconds_of(prompts, outputs.tolist(), shard_of)
    assert found.seconds[: len(seconds)] == pytest.approx(seconds)
    assert not found.seconds[len(seconds) :].any()
    assert found.repeated_tokens == found.computed_tokens.sum() - tokens_of(prompts)
    assert found.seconds.max() >= found.lower_bound * (1 - 1e-9)
    again = evaluate(plan, found.shard_of, shards, outputs, TOKENS)
    assert again.seconds == pytest.approx(found.seconds)
    assert again.computed_tokens.tolist() == found.computed_tokens.tolist()
    assert again.repeated_tokens == found.repeated_tokens
    assert partition(plan, shards, outputs, TOKENS).shard_of.tolist() == shard_of


@thorough
@given(batches(max_prompts=20), st.sampled_from([2, 4, 16]), st.integers(2, 4))
def test_pages(prompts: list[list[int]], page_size: int, shards: int) -> None:
    """What is shared in whole pages only is computed again by each, as by a plan of its own."""
    plan = plan_batch(prompts, page_size)
    found = partition(plan, shards, costs=TOKENS)
    for shard in range(shards):
        mine = [prompts[index] for index in np.flatnonzero(found.shard_of == shard)]
        tree = plan_batch(mine, page_size).tree
        assert found.computed_tokens[shard] == tree.edge_len.sum()


@thorough
@given(batches(max_prompts=6), st.integers(2, 3), st.integers(0, 2**32))
def test_no_partition_is_below_the_bound(prompts: list[list[int]], shards: int, seed: int) -> None:
    outputs = np.random.default_rng(seed).integers(0, 9, len(prompts))
    plan = plan_batch(prompts, 1, outputs)
    found = partition(plan, shards, outputs, TOKENS)
    best = min(
        max(seconds_of(prompts, outputs.tolist(), list(shard_of)), default=0)
        for shard_of in product(range(shards), repeat=len(prompts))
    )
    assert found.lower_bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("name", ["M1", "M3", "M4", "M5", "mixed", "classify", "label"])
@pytest.mark.parametrize("shards", [2, 8, 16])
def test_shards_of_realistic_batches_are_even(name: str, shards: int) -> None:
    case = CASES[name]
    outputs = np.array(case.outputs())
    plan = plan_batch(case.prompts(32_000), 1, outputs)
    found = partition(plan, shards, outputs)
    assert found.balance <= 1.03
    assert found.repeated_tokens <= (shards - 1) * plan.prompt_lens.max()
    assert found.seconds.max() <= 1.25 * found.lower_bound


def test_a_group_is_cut_where_that_pays() -> None:
    def group(first: int, size: int) -> list[list[int]]:
        return [[first] * 300 + [first, index] for index in range(size)]

    prompts = [prompt for first in range(10) for prompt in group(first, 20)]
    shard_of = partition(plan_batch(prompts), 5).shard_of.reshape(10, 20)
    assert (shard_of == shard_of[:, :1]).all()
    assert np.bincount(shard_of[:, 0]).tolist() == [2] * 5

    found = partition(plan_batch(prompts), 4)  # two and a half each
    assert found.balance < 1.02
    assert found.repeated_tokens == 2 * 301

    large = group(10, 400)
    found = partition(plan_batch([*prompts, *large]), 5)
    assert (found.shard_of[:200].reshape(10, 20) == found.shard_of[:200:20, None]).all()
    users = len(np.unique(found.shard_of[200:]))
    assert users > 1
    assert found.repeated_tokens == (users - 1) * 301


def test_half_of_all_requests_in_one_group() -> None:
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 32_000, 2000).tolist()
    others = [rng.integers(0, 32_000, 2000).tolist() for _ in range(50)]
    prompts = [
        (prefix if index % 2 else others[index // 2 % 50]) + rng.integers(0, 32_000, 100).tolist()
        for index in range(2000)
    ]
    found = partition(plan_batch(prompts), 8, np.full(2000, 50))
    assert found.balance < 1.03
    assert 0 < found.repeated_tokens <= 7 * 2000


def test_few_requests_and_none() -> None:
    assert partition(plan_batch([[1, 2], [1, 3]]), 5).seconds.max() > 0
    empty = partition(plan_batch([]), 3)
    assert empty.shard_of.tolist() == []
    assert empty.balance == 1.0
    assert empty.computed_tokens.tolist() == [0, 0, 0]


def test_what_can_not_be_is_named() -> None:
    plan = plan_batch([[1], [2]])
    with pytest.raises(ValueError, match="shards is 0"):
        partition(plan, 0)
    with pytest.raises(ValueError, match="expected_output_lens has shape"):
        partition(plan, 2, np.ones(3, np.int64))
    with pytest.raises(ValueError, match="shard_of has shape"):
        evaluate(plan, np.zeros(3, np.int64), 2)
    with pytest.raises(ValueError, match="shards 0 to 2; pass 0 to 1"):
        evaluate(plan, np.array([0, 2]), 2)
