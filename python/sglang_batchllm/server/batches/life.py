"""OpenAI's ``expires_after``."""

from __future__ import annotations

from typing import Any

from sglang_batchllm.server.batches.errors import ApiError
from sglang_batchllm.server.batches.limits import DAY, HOUR


def read_seconds(life: Any, param: str) -> int:
    """How long a file is to live. Raises ApiError (400).

    life: as the client gave it. param: its name.
    """
    if not isinstance(life, dict) or set(life) != {"anchor", "seconds"}:
        raise ApiError(400, f"{param} has an anchor and seconds", param=param)
    if life["anchor"] != "created_at":
        raise ApiError(400, f"the anchor of {param} is 'created_at'", param=param)
    seconds = life["seconds"]
    if type(seconds) is not int or not HOUR <= seconds <= 30 * DAY:
        raise ApiError(
            400, f"the seconds of {param} are a whole number from {HOUR} to {30 * DAY}", param=param
        )
    return seconds
