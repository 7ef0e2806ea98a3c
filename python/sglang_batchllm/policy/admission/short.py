"""Short answers: those that decode do so in the steps that prefill others, or between them.

Requests of a few output tokens spend most of their time in prefill steps, and what the host does
for each of them is much beside their few decode steps. If the pool were filled first, and then
emptied, decode steps of a thousand rows and more would follow one another, each of which the host
prepares and sees to the results of; between two prefill steps it can do that while the GPU
prefills. A step of ENOUGH_ROWS uses the weights that it reads as well as a fuller one.

Where the engine can mix the two, those that decode ride in the steps that prefill, if these are
full: a row more costs a full step what a prompt token does, and no step of its own. Where steps are
not full it is the host that takes the time, and a decode step is one CUDA graph for it, while a
mixed one is launched kernel by kernel.

Longer answers are decoded together once all are prefilled: as late ones would end later, the batch
would take more steps.
"""

from __future__ import annotations

import numpy as np

SHORT_OUTPUT = 8
"""Most tokens of output."""
FULL = 0.5
"""Of a chunk: to take less is not to be full."""
ENOUGH_ROWS = 256
"""Fewest requests that decode in a step between two that prefill. From 184 rows on an H200's matrix
products are bound by its arithmetic and not by its memory (`admission.level`)."""


def is_short(max_output: int) -> bool:
    """Whether requests that may decode so many tokens (0: any) decode at all, and briefly."""
    return 1 < max_output <= SHORT_OUTPUT


def decode_next(max_output: np.ndarray, decoding: int) -> bool:
    """After a prefill step: whether those that run decode before others are prefilled.

    max_output: int64, tokens that each of them may decode, 0 for any number; decoding: how many are
    past their prefill, some of whom may have ended since.
    """
    return decoding >= ENOUGH_ROWS and all_are(max_output)


def all_are(max_output: np.ndarray) -> bool:
    """Whether requests run, and all of them briefly. max_output: as above."""
    if not len(max_output):
        return False
    return bool(max_output.min() > 0) and is_short(int(max_output.max()))
