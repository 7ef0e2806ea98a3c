"""Handlers of OpenAI's endpoints, which render and tokenize in the event loop."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase


async def convert_off_loop(
    handler: OpenAIServingBase, request: Any, raw_request: Any
) -> OpenAIServingBase:
    """The handler, for this request only, once a thread has made a request of ``/generate`` of it:
    a long chat's template and tokens take milliseconds, in which nobody else would be served.

    raw_request: of HTTP, if any.
    """
    if handler._validate_request(request):
        return handler
    loop = asyncio.get_running_loop()
    try:
        converted = await loop.run_in_executor(
            None, handler._convert_to_internal_request, request, raw_request
        )
    except Exception:
        return handler  # it meets the same again, and has an answer to it
    ready: Any = copy.copy(handler)
    ready._convert_to_internal_request = lambda *_: converted
    return ready
