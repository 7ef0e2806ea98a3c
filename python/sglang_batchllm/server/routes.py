"""The URLs of the report, and of batches that `run_batch` hands over whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Path
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sglang_batchllm.client.get_report import report_in
from sglang_batchllm.server.errors import RefusedError
from sglang_batchllm.server.front import FrontEnd
from sglang_batchllm.server.handover import HandOver
from sglang_batchllm.server.registry import Registry
from sglang_batchllm.wire.lines import MAX_BYTES, URLS
from sglang_batchllm.wire.paths import REPORT_PATH, RUN_PATH

LINES = "application/x-ndjson"

BatchId = Annotated[str, Path(json_schema_extra={"pattern": "^[0-9a-f]{32}$"})]
"""The registry checks it, and does not repeat what it was given."""

_LINE = {
    "description": "A line of the body.",
    "type": "object",
    "properties": {
        "program": {"type": "integer", "minimum": 0, "description": "Who asks."},
        "more": {
            "type": "boolean",
            "description": "Whether the program will send further requests by itself.",
        },
        "url": {"enum": [*URLS], "description": "What the request is for; /generate if missing."},
        "request": {"type": "object", "description": "A body of that URL."},
    },
    "required": ["program", "more", "request"],
}

_ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "object", "properties": {"message": {"type": "string"}}},
        "message": {"type": "string"},
    },
    "anyOf": [{"required": ["error"]}, {"required": ["message"]}],
}
"""Ours, or SGLang's for a parameter or body that FastAPI refuses."""


def _refusals(**statuses: str) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI. statuses: what `_400` and the like mean."""
    content = {"application/json": {"schema": _ERROR}}
    return {
        int(status[1:]): {"description": meaning, "content": content}
        for status, meaning in statuses.items()
    }


def add_routes(app: FastAPI, registry: Callable[[], Registry]) -> None:
    """Before the server starts, so that SGLang's API key guards these too.

    registry: of the server's front end, once that is there.
    """

    async def report() -> dict[str, Any]:
        """What batches have done and do."""
        return report_in(await registry().front.internal_states())

    async def describe() -> dict[str, int]:
        """How many requests the server runs at a time."""
        return await limits(registry().front)

    async def run(batch: BatchId, request: Request, yields: bool = False) -> Response:
        """Run a list of requests that are planned together. The body has a line of JSON for each;
        so has the response, as requests finish, and empty lines while there is nothing to send.
        It ends once every request is answered and every program that was to send more has ended.
        With `yields` all other requests of the server go first.
        Closing the connection aborts what remains."""
        chunks = request.stream()
        try:
            handover = registry().begin(batch, yields)
            try:
                async for chunk in chunks:
                    await handover.add(chunk)
                await handover.finish()
            except BaseException:
                await handover.abandon()
                raise
        except ClientDisconnect:
            return Response()
        except RefusedError as refused:
            await _read_over(chunks)
            return _refusal(refused)
        return StreamingResponse(
            _answers(handover), media_type=LINES, background=BackgroundTask(handover.abandon)
        )

    async def ended(batch: BatchId, programs: dict[int, bool]) -> Response:
        """Programs of a batch, by index, send no more requests. The values say whether each of
        them sent more than its first requests."""
        try:
            registry().end_programs(batch, programs)
        except RefusedError as refused:
            return _refusal(refused)
        return JSONResponse(None)

    app.add_api_route(REPORT_PATH, report, methods=["GET"])
    app.add_api_route(RUN_PATH, describe, methods=["GET"])
    app.add_api_route(
        RUN_PATH + "/{batch}",
        run,
        methods=["POST"],
        response_class=StreamingResponse,
        openapi_extra={"requestBody": {"content": {LINES: {"schema": _LINE}}, "required": True}},
        responses={
            200: {
                "description": 'Lines of {"index": of the line, "status": as the URL has it, '
                '"content": its answer}.',
                "content": {LINES: {"schema": {"type": "string"}}},
            },
            **_refusals(
                _400="Not the id of a batch.",
                _409="The id is in use.",
                _413="More than a hand-over may have.",
                _503="Other hand-overs have all the room; try again later.",
            ),
        },
    )
    app.add_api_route(
        RUN_PATH + "/{batch}/ended",
        ended,
        methods=["POST"],
        response_class=JSONResponse,
        responses=_refusals(_400="Not programs.", _404="No such batch is open."),
    )


async def limits(front: FrontEnd) -> dict[str, int]:
    """What a client has to know of the server."""
    states = await front.internal_states()
    running = sum(state["effective_max_running_requests_per_dp"] for state in states)
    return {"max_running_requests": running}


async def _answers(handover: HandOver) -> AsyncIterator[bytes]:
    """Of the hand-over, which is abandoned when the response ends, however it ends."""
    try:
        async for lines in handover.answers():
            yield lines
    finally:
        closing = asyncio.create_task(handover.abandon())  # this one may have been cancelled
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()


async def _read_over(chunks: AsyncIterator[bytes]) -> None:
    """Let the client finish, or it would never read the answer; but not for ever."""
    left = MAX_BYTES
    try:
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                return
    except ClientDisconnect:
        pass


def _refusal(refused: RefusedError) -> JSONResponse:
    return JSONResponse(refused.reply.content, refused.reply.status_code)
