"""Requests of a hand-over for OpenAI's endpoints: SGLang's own handlers answer them whole.

A handler makes a request of ``/generate`` from its own and passes it to the front end. The request
of a hand-over is known there by the task that asks, and takes the hand-over's id.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from starlette.responses import Response

from sglang_batchllm.edge import seams
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS, Reply

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import openai as seam
else:
    seam = seams.load("openai")

T = TypeVar("T")

_HANDLERS = {
    CHAT: (TypeAdapter(ChatCompletionRequest), "openai_serving_chat"),
    COMPLETIONS: (TypeAdapter(CompletionRequest), "openai_serving_completion"),
}
"""What FastAPI checks the body of each URL with, and where SGLang's server keeps its handler."""

_rid: ContextVar[str | None] = ContextVar("rid", default=None)


@dataclass(frozen=True)
class Asked:
    """A request for one of OpenAI's endpoints, and SGLang's handler of it."""

    request: Any
    handler: Any

    async def answer(self, rid: str) -> Reply:
        """rid: of the request that reaches the front end. In a task of its own."""
        raw_request: Any = None  # the hand-over's is no request of this endpoint
        handler = await seam.convert_off_loop(self.handler, self.request, raw_request)
        _rid.set(rid)
        answer = await handler.handle_request(self.request, raw_request)
        if isinstance(answer, Response):
            return Reply(answer.status_code, orjson.loads(bytes(answer.body)))
        if isinstance(answer, BaseModel):
            answer = answer.model_dump(mode="json", by_alias=True)
        return Reply(200, answer)


def read(url: str, body: object) -> Asked:
    """url: of `_HANDLERS`. Raises ValueError and RequestValidationError, as
    the endpoint does."""
    from sglang.srt.entrypoints import http_server

    adapter, name = _HANDLERS[url]
    handler = getattr(http_server.app.state, name, None)
    if handler is None:
        raise ValueError(f"an engine without a server has no {url}; send bodies of /generate")
    if not isinstance(body, dict):
        raise ValueError(f"a body of {url} is an object")  # SGLang's own checks take that as given
    request = validated(adapter, body)
    request.stream = False
    return Asked(request, handler)


def validated(adapter: TypeAdapter[T], body: object) -> T:
    """Raises RequestValidationError, as FastAPI does."""
    try:
        return adapter.validate_python(body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in errors], body=body
        ) from None


def claim(request: Any) -> str | None:
    """A request that an endpoint of OpenAI's has made in the task of a hand-over takes that one's
    id, which is returned."""
    rid = _rid.get()
    if rid is not None:
        _rid.set(None)
        request.rid = rid
    return rid
