"""Steps kept level: a batch whose steps are full enough starts nothing that can wait.

A decode step of few requests takes nearly as long as one of ENOUGH_ROWS: reading the weights takes
longer than using them. And a batch takes at least as many steps as its longest output. Where
outputs differ in length and all requests start at once, the first steps are much fuller than that
and the last ones nearly empty. So once enough requests run, others start only as these end, for
as long as the plan's order (longest first) lets them end no later than the longest one.

Lengths are what `outputs` expects. Where requests end by themselves that is the same for all, and
nothing waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_batchllm.runtime.batch import PlannedBatch
    from sglang_batchllm.runtime.lookahead import Lookahead

ENOUGH_ROWS = 128
"""Requests up to which a decode step takes hardly longer than for one. An H200 does 184 operations
(790 TFLOP/s) in the time of reading one byte (4.3 TB/s), enough for 184 rows; the cost model fitted
to measured steps (`benchmark/cost_model.py`) says 112 to 128."""


def can_wait(batch: PlannedBatch, lookahead: Lookahead) -> bool:
    """Whether the batch's waiting requests may start later without making it longer.

    Only for batches that were handed over whole and that nothing continues: elsewhere somebody
    waits for each answer.
    """
    if not (batch.private and batch.outputs_differ and batch.num_waiting):
        return False
    if len(batch.running) < ENOUGH_ROWS:
        return False
    longest = lookahead.longest
    waiting = lookahead.waiting_steps()
    if waiting.max() >= longest:
        return False
    return len(batch.running) * longest >= lookahead.steps_left + float(waiting.sum())
