"""Shards cut into pieces that share next to nothing, to be handed out one by one."""

from __future__ import annotations

import numpy as np

from sglang_batchllm.planning.partition import Costs
from sglang_batchllm.planning.plan import BatchPlan

NEXT_TO_NOTHING = 1 / 1000
"""A prefix of such a part of a shard's time may be computed again for a piece, if it is not in the
cache any more; pieces are about ten at most."""


def pieces_of(
    plan: BatchPlan,
    shard_of: np.ndarray,
    shards: int,
    outputs: np.ndarray,
    least_shard: int,
    least_piece: int,
    costs: Costs,
) -> np.ndarray:
    """Which piece of its shard each request is in; int64[n], 0 for the first.

    In the plan's order the first piece takes half of the shard's predicted seconds, and each other
    one half of what is left, but no fewer than `least_piece` requests; what shares more than
    `NEXT_TO_NOTHING` stays together. Shards of fewer than `least_shard` requests are one piece.
    """
    tree, order = plan.tree, plan.order
    context = plan.prompt_lens + outputs / 2
    seconds = costs.prefill_token * plan.to_compute
    seconds = seconds + outputs * (costs.decode_token + costs.kv_token * context)
    cheap = tree.depth * costs.prefill_token <= seconds.sum() / shards * NEXT_TO_NOTHING
    tops = np.flatnonzero(~cheap & cheap[tree.parent])
    subtree = np.searchsorted(tops, tree.request_node, side="right")
    alone = cheap[tree.request_node]
    subtree[alone] = len(tops) + 1 + np.arange(np.count_nonzero(alone))
    piece_of = np.zeros(len(order), np.int64)
    for shard in range(shards):
        mine = order[shard_of[order] == shard]
        if len(mine) < least_shard:
            continue
        ends = np.flatnonzero(np.diff(subtree[mine], append=-1)) + 1
        until = np.concatenate([[0.0], np.cumsum(seconds[mine])])
        start = piece = 0
        while len(mine) - start > least_piece:
            middle = (until[start] + until[-1]) / 2
            fits = (until[ends] >= middle) & (ends - start >= least_piece)
            start = int(ends[fits.argmax()])
            piece += 1
            piece_of[mine[start:]] = piece
    return piece_of
