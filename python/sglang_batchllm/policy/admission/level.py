"""Steps kept level: a batch whose steps are full enough starts nothing that can wait.

The matrix products of a decode step take nearly as long for few requests as for ENOUGH_ROWS:
reading the weights takes longer than using them. And a batch takes at least as many steps as its
longest output. Where outputs differ in length and all requests start at once, the first steps are
much fuller than that and the last ones nearly empty. So once enough requests run, others start
only as these end, for as long as the plan's order (longest first) lets them end no later than the
longest one. (Memory is not looked at: where it is short, it decides who starts, and the batch may
take more steps.)

Lengths are what `outputs` expects. Where requests end by themselves that is the same for all that
may run so long, and nothing waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_batchllm.policy.admission.lookahead import Lookahead
    from sglang_batchllm.policy.batch import Batch

ENOUGH_ROWS = 128
"""Requests up to which a decode step's matrix products take hardly longer than for one. An H200
does 184 operations (790 TFLOP/s) in the time of reading one byte (4.3 TB/s), enough for 184 rows of
16-bit weights; the cost model fitted to measured steps (`benchmark/cost_model.py`) says 112 to
128."""


def can_wait(batch: Batch, lookahead: Lookahead) -> bool:
    """Whether the batch's waiting requests may start later without making it longer.

    Only for batches that were handed over whole and that nothing continues: elsewhere somebody
    waits for each answer.
    """
    if not (batch.private and batch.outputs_differ and batch.waiting.count):
        return False
    if batch.num_running < ENOUGH_ROWS:
        return False
    running, waiting = lookahead.steps_by_whole_batch(batch)
    longest = running.max()
    if waiting.max() >= longest:
        return False
    return bool(len(running) * longest >= running.sum() + waiting.sum())
