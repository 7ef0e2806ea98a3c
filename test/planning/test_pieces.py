"""Pieces of shards: whole subtrees, half of what is left each."""

import random

import numpy as np
import pytest

from sglang_batchllm.planning import Costs, partition, pieces_of, plan_batch

SHARDS = 3


@pytest.mark.parametrize("seed", range(10))
def test_pieces_share_nothing_and_halve_what_is_left(seed):
    rng = random.Random(seed)
    documents = [[number, *rng.choices(range(100), k=30)] for number in range(60)]
    prompts = [
        [*rng.choice(documents), *rng.choices(range(100), k=rng.randint(0, 9))] for _ in range(700)
    ]
    outputs = np.array([rng.randint(0, 50) for _ in prompts])
    plan = plan_batch(prompts, 1, outputs)
    shard_of = partition(plan, SHARDS, outputs).shard_of
    pieces = pieces_of(plan, shard_of, SHARDS, outputs, 100, 10, Costs())
    for shard in range(SHARDS):
        mine = np.flatnonzero(shard_of == shard)
        first = {prompts[i][0]: pieces[i] for i in mine}
        assert all(first[prompts[i][0]] == pieces[i] for i in mine), "a document is in one piece"
        sizes = np.bincount(pieces[mine])
        assert len(sizes) > 2
        assert sizes[:-1].min() >= 10
        steps = np.bincount(pieces[mine], outputs[mine])
        assert 0.35 < steps[0] / steps.sum() < 0.65
        distinct = [
            plan_batch([prompts[i] for i in mine[pieces[mine] == piece]], 1).report.distinct_tokens
            for piece in range(len(sizes))
        ]
        whole = plan_batch([prompts[i] for i in mine], 1).report.distinct_tokens
        assert sum(distinct) == whole


def test_what_is_short_or_shares_all_is_one_piece():
    prompts = [[1, 2, 3, number] for number in range(300)]
    outputs = np.ones(300, np.int64)
    plan = plan_batch(prompts, 1, outputs)
    shard_of = np.arange(300) % 2
    assert not pieces_of(plan, shard_of, 2, outputs, 100, 10, Costs()).any()
    free = Costs(prefill_token=1e-9)
    assert pieces_of(plan, shard_of, 2, outputs, 100, 10, free).any(), "a prefix of no account"
    alone = plan_batch([[number] for number in range(300)], 1, outputs)
    assert not pieces_of(alone, shard_of, 2, outputs, 151, 10, Costs()).any()
    assert pieces_of(alone, shard_of, 2, outputs, 150, 10, Costs()).any()
