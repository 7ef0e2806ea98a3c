"""Short answers: steps that decode alternate with those that prefill.

Requests of a few output tokens spend most of their time in prefill steps, and what the host does
for each of them is much beside their few decode steps. If the pool were filled first, and then
emptied, a decode step would have a thousand rows and more, and the GPU would wait for the host,
which prepares them and sees to their results; between two prefill steps the host does that while
the GPU prefills. A step of ENOUGH_ROWS uses the weights that it reads as well as a fuller one.

Longer answers are decoded together once all are prefilled: as late ones would end later, the batch
would take more steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_batchllm.policy.admission import level

if TYPE_CHECKING:
    from sglang_batchllm.policy.admission.running import Running

SHORT_OUTPUT = 8
"""Most tokens of output."""
ENOUGH_ROWS = 2 * level.ENOUGH_ROWS
"""Fewest requests that decode in a step between two that prefill."""


def is_short(max_output: int) -> bool:
    """Whether requests that may decode so many tokens (0: any) decode at all, and briefly."""
    return 1 < max_output <= SHORT_OUTPUT


def decode_next(running: Running, decoding: int) -> bool:
    """After a prefill step: whether those that run decode before others are prefilled."""
    if decoding < ENOUGH_ROWS:
        return False
    return bool(running.max_output.min() > 0) and is_short(int(running.max_output.max()))
