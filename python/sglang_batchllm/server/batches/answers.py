"""Between handlers of the API and HTTP."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sglang_batchllm.server.batches.errors import ApiError, shown

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

MAX_READ_OVER = 512 << 20
"""Bytes of a refused body that are read, so that the client gets to read the answer."""

_NUMBER = re.compile(r"\d{1,9}")


def answering(handler: Handler) -> Handler:
    """Errors are answered in OpenAI's form, after the rest of the body."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response()
        except ApiError as error:
            refused = error
        except Exception:
            logger.exception("A request of the batch API failed")
            refused = ApiError(500, "the server failed; its log says why")
        await _read_over(request)
        return refused.response()

    return answer


async def _read_over(request: Request) -> None:
    left = MAX_READ_OVER
    try:
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return
    except (ClientDisconnect, RuntimeError):  # gone, or read before
        pass


async def read_body(request: Request, most: int) -> bytes:
    """Raises ApiError (413) for more bytes than `most`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise ApiError(413, f"the body is at most {most} bytes")
    return bytes(body)


def read_query(request: Request, *names: str) -> dict[str, str]:
    """The parameters of a URL. Raises ApiError (400) for one that is not among these names."""
    for name in request.query_params:
        if name not in names:
            raise ApiError(400, f"there is no parameter {shown(name)}", param=name[:64])
    return dict(request.query_params)


def read_limit(query: dict[str, str], most: int, default: int) -> int:
    """Objects in a page. Raises ApiError (400)."""
    given = query.get("limit", str(default))
    if not _NUMBER.fullmatch(given) or not 1 <= int(given) <= most:
        raise ApiError(400, f"limit is a number from 1 to {most}", param="limit")
    return int(given)


def page_response(objects: list[dict[str, Any]], has_more: bool) -> JSONResponse:
    return JSONResponse(
        {
            "object": "list",
            "data": objects,
            "first_id": objects[0]["id"] if objects else None,
            "last_id": objects[-1]["id"] if objects else None,
            "has_more": has_more,
        }
    )
