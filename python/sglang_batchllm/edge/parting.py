"""Long lists go to the scheduler in parts: the first runs while the others are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.io_struct import _USE_PICKLE_IPC, EmbeddingReqInput, GenerateReqInput

from sglang_batchllm.edge.model_kind import has_recurrent_state
from sglang_batchllm.server.handover import SLICE

OPENING_TOKENS = 1 << 14
"""Of the first part, without what its prompts share: two prefill steps of usual size."""

CHARACTERS = 4
"""Of text that make a token, about."""

DEPTHS = [1 << power for power in range(5, 14)]
"""At which the beginnings of prompts are compared."""


class Sent(list[Any]):
    """A list of tokenized requests that are on their way already."""


def comes_in_parts(
    requests: GenerateReqInput | EmbeddingReqInput, batch_size: int, model: Any
) -> bool:
    """Whether parts of the list may run before the others are known. Logprobs of prompts are
    shared by one plan for all, and so are states, which are kept where prompts branch. model: its
    ModelConfig."""
    flags: Any = requests.return_logprob if isinstance(requests, GenerateReqInput) else ()
    return (
        batch_size >= 2 * SLICE
        and isinstance(requests, GenerateReqInput)
        and _USE_PICKLE_IPC
        and not any(flags)
        and requests.input_embeds is None
        and requests.session_params is None
        and not has_recurrent_state(model)
    )


def opening_of(prompts: Sequence[str | Sequence[int]]) -> list[int]:
    """Which of the prompts go first, by their indices: as many as it takes for `OPENING_TOKENS`
    besides what they share, sharing as much with the first of all as that leaves. None where those
    were half of the list or more."""
    whole = OPENING_TOKENS * (CHARACTERS if isinstance(prompts[0], str) else 1)
    first = prompts[0]
    opening: list[int] = []
    for depth in [0, *DEPTHS]:
        found, size, head = [], 0, first[:depth]
        for index, prompt in enumerate(prompts):
            if prompt[:depth] == head:
                found.append(index)
                size += len(prompt) - depth
                if size >= whole:
                    break
        if size < whole or len(first) < depth:
            break
        opening = found
    return opening if 2 * len(opening) < len(prompts) else []
