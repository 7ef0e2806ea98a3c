"""``/v1/batches``."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sglang_batchllm.server.batches.answers import (
    answering,
    page_response,
    read_body,
    read_limit,
    read_query,
)
from sglang_batchllm.server.batches.order import MAX_BYTES, read_order
from sglang_batchllm.server.batches.store import Store

MAX_PAGE = 100
PAGE = 20


def add_batch_routes(app: FastAPI, store: Store, wake: Callable[[], None]) -> None:
    """wake: is called when there is a new batch."""
    batches = store.batches

    async def create_batch(request: Request) -> Response:
        """Run the requests of a file."""
        order = read_order(await read_body(request, MAX_BYTES))
        record = await run_in_threadpool(batches.create, order)
        wake()
        return JSONResponse(record.to_json())

    async def list_batches(request: Request) -> Response:
        """Batches, the newest first; after and limit as OpenAI has them."""
        query = read_query(request, "after", "limit")
        limit = read_limit(query, MAX_PAGE, PAGE)
        records, has_more = await run_in_threadpool(batches.page, query.get("after"), limit)
        return page_response([record.to_json() for record in records], has_more)

    async def retrieve_batch(request: Request) -> Response:
        """How far a batch is."""
        record = await run_in_threadpool(batches.get, request.path_params["batch_id"])
        return JSONResponse(record.to_json())

    async def cancel_batch(request: Request) -> Response:
        """What has not been answered will not be; what has is kept."""
        record = await run_in_threadpool(batches.cancel, request.path_params["batch_id"])
        return JSONResponse(record.to_json())

    for path, method, handler in (
        ("", "POST", create_batch),
        ("", "GET", list_batches),
        ("/{batch_id}", "GET", retrieve_batch),
        ("/{batch_id}/cancel", "POST", cancel_batch),
    ):
        app.add_api_route(f"/v1/batches{path}", answering(handler), methods=[method])
