"""Handlers of OpenAI's endpoints, which render and tokenize in threads."""

from __future__ import annotations

from typing import Any


async def convert_off_loop(handler: Any, request: Any, raw_request: Any) -> Any:
    """The handler itself."""
    return handler
