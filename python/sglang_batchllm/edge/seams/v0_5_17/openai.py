"""Handlers of OpenAI's endpoints, which render and tokenize in the event loop."""

from __future__ import annotations

import asyncio
import copy
from typing import Any


async def convert_off_loop(handler: Any, request: Any) -> Any:
    """The handler, for this request only, once a thread has made a request of ``/generate`` of it:
    a long chat's template and tokens take milliseconds, in which nobody else would be served."""
    if handler._validate_request(request):
        return handler
    loop = asyncio.get_running_loop()
    try:
        converted = await loop.run_in_executor(
            None, handler._convert_to_internal_request, request, None
        )
    except Exception:
        return handler  # it meets the same again, and has an answer to it
    ready = copy.copy(handler)
    ready._convert_to_internal_request = lambda *_: converted
    return ready
