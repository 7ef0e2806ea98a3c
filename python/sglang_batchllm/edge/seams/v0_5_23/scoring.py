"""What computes logprobs of prompts."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req


def finalize(output: Any) -> None:
    """Have the logprobs of a pass's input be lists."""
    output.finalize_input_logprobs()


def reads_few_positions(req: Req) -> bool:
    """Whether the request is scored at positions of its own."""
    return req.token_indices_to_pool is not None
