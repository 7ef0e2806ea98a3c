"""What computes logprobs of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import Req


def compute_rows(original: Callable[..., Any], processor: Any, arguments: dict[str, Any]) -> Any:
    """The logprobs of a pass's input rows, and the logits of its sampled rows. SGLang does not wait
    for the GPU here."""
    return original(processor, **arguments)


def finalize(output: Any) -> None:
    """Have the logprobs of a pass's input be lists."""
    output.finalize_input_logprobs()


def reads_few_positions(req: Req) -> bool:
    """Whether the request is scored at positions of its own."""
    return req.token_indices_to_pool is not None
