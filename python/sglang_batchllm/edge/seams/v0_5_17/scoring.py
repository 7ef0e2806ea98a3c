"""What computes logprobs of prompts."""

from __future__ import annotations

from typing import Any


def finalize(output: Any) -> None:
    """Have the logprobs of a pass's input be lists; they are."""
