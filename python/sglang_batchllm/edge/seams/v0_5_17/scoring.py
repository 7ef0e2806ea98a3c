"""What computes logprobs of prompts."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req


def finalize(output: Any) -> None:
    """Have the logprobs of a pass's input be lists; they are."""


def reads_few_positions(req: Req) -> bool:
    """Whether the request is scored at positions of its own; none is, unless the server says so."""
    return False
