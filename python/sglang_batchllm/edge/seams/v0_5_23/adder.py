"""What SGLang's builder of prefill batches sets aside."""

from __future__ import annotations

from sglang.srt.managers.schedule_policy import PrefillAdder

REPLACED: str | None = None
"""What is replaced, where the scheduler is not asked for its builder."""


def is_set_aside(adder: PrefillAdder) -> int:
    """Tokens for requests that run and new ones, until they end."""
    return adder.memory_budget.total_offset


def needed_now(adder: PrefillAdder) -> int:
    """Tokens for this step alone."""
    return adder.memory_budget.current_offset


def set_aside(adder: PrefillAdder, tokens: int) -> None:
    """So many more."""
    adder.memory_budget.total_offset += tokens
