"""What SGLang's builder of prefill batches sets aside."""

from __future__ import annotations

from sglang.srt.managers.schedule_policy import PrefillAdder

REPLACED: str | None = "srt.managers.schedule_policy.PrefillAdder"
"""What is replaced, where the scheduler is not asked for its builder."""


def is_set_aside(adder: PrefillAdder) -> int:
    """Tokens for requests that run and new ones, until they end."""
    return adder.rem_total_token_offset


def needed_now(adder: PrefillAdder) -> int:
    """Tokens for this step alone."""
    return adder.cur_rem_token_offset


def set_aside(adder: PrefillAdder, tokens: int) -> None:
    """So many more."""
    adder.rem_total_token_offset += tokens
