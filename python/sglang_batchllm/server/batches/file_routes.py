"""``/v1/files``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import quote

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sglang_batchllm.server.batches.answers import (
    answering,
    page_response,
    read_limit,
    read_query,
)
from sglang_batchllm.server.batches.errors import ApiError
from sglang_batchllm.server.batches.file_store import FileRecord
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.upload import Uploads

PIECE_BYTES = 1 << 20
"""What is read at a time."""

MAX_PAGE = 10_000


def add_file_routes(app: FastAPI, store: Store) -> None:
    """Disk and database are used in threads, so that the event loop never waits for them."""
    uploads = Uploads(store.directory, store.files, store.limits)

    async def create_file(request: Request) -> Response:
        """Upload a file: multipart/form-data with purpose and file."""
        return JSONResponse((await uploads.receive(request)).to_json())

    async def list_files(request: Request) -> Response:
        """Files, the newest first; after, limit, order and purpose as OpenAI has them."""
        query = read_query(request, "after", "limit", "order", "purpose")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order is asc or desc", param="order")
        limit = read_limit(query, MAX_PAGE, MAX_PAGE)
        records, has_more = await run_in_threadpool(
            store.files.page, query.get("after"), limit, order == "desc", query.get("purpose")
        )
        return page_response([record.to_json() for record in records], has_more)

    async def retrieve_file(request: Request) -> Response:
        """What is known of a file."""
        record = await run_in_threadpool(store.files.get, request.path_params["file_id"])
        return JSONResponse(record.to_json())

    async def file_content(request: Request) -> Response:
        """What is in a file."""
        record = await run_in_threadpool(store.files.get, request.path_params["file_id"])
        try:
            file = await run_in_threadpool(store.directory.content(record.id).open, "rb")
        except FileNotFoundError:
            raise ApiError(404, "the content of the file is gone", code="not_found") from None
        return StreamingResponse(_pieces(file), headers=_headers(record))

    async def delete_file(request: Request) -> Response:
        """Delete a file, unless an open batch reads it."""
        file_id = request.path_params["file_id"]
        await run_in_threadpool(store.files.delete, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    for path, method, handler in (
        ("", "POST", create_file),
        ("", "GET", list_files),
        ("/{file_id}", "GET", retrieve_file),
        ("/{file_id}/content", "GET", file_content),
        ("/{file_id}", "DELETE", delete_file),
    ):
        app.add_api_route(f"/v1/files{path}", answering(handler), methods=[method])


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _headers(record: FileRecord) -> dict[str, str]:
    return {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(record.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
