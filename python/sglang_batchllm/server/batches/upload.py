"""From a request's body to a file on the disk, without holding it in memory."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.errors import ApiError, shown
from sglang_batchllm.server.batches.file_store import BATCH, FileRecord, Files
from sglang_batchllm.server.batches.ids import new_file_id
from sglang_batchllm.server.batches.life import read_seconds
from sglang_batchllm.server.batches.limits import Limits
from sglang_batchllm.server.batches.multipart import Form, FormReader

PIECE_BYTES = 1 << 20
"""What is collected for one write."""

MAX_FILENAME = 1024
"""Characters."""

_FORM_BYTES = 128 << 10
"""More than a form has beside its file."""

_DIGITS = re.compile(r"\d{1,18}")


class Uploads:
    """Those of a server. They run in its event loop, and write in threads."""

    def __init__(self, directory: Directory, files: Files, limits: Limits):
        self._directory = directory
        self._files = files
        self._limits = limits
        self._under_way = 0

    async def receive(self, request: Request) -> FileRecord:
        """Raises ApiError for what is no upload (400), too large (413), more than the disk holds
        (507), or one too many (429, 503); and ClientDisconnect. Nothing is left of it then."""
        declared = request.headers.get("content-length", "")
        self._check_room(int(declared) - _FORM_BYTES if _DIGITS.fullmatch(declared) else 0)
        if self._under_way >= self._limits.uploads_at_once:
            raise ApiError(503, "too many uploads at once; try again soon", code="overloaded")
        self._under_way += 1
        file_id = new_file_id()
        path = self._directory.upload(file_id)
        try:
            form = await self._write(request, path)
            seconds = _check_fields(form)
            assert form.filename is not None
            return await run_in_threadpool(
                self._files.keep_upload, file_id, form.filename[:MAX_FILENAME], seconds
            )
        except BaseException:
            # Not awaited, as the request may have been cancelled.
            remove = partial(path.unlink, missing_ok=True)
            asyncio.get_running_loop().run_in_executor(None, remove)
            raise
        finally:
            self._under_way -= 1

    async def _write(self, request: Request, path: Path) -> Form:
        pending = _Pending()
        reader = FormReader(request.headers.get("content-type", ""), pending.add)
        file = await run_in_threadpool(_create, path)
        try:
            async for chunk in request.stream():
                reader.feed(chunk)
                if pending.size >= PIECE_BYTES:
                    self._check_room(pending.total)
                    await run_in_threadpool(_append, file, pending.take())
            form = reader.finish()
            if not pending.total:
                raise ApiError(400, "the file is empty", param="file")
            self._check_room(pending.total)
            await run_in_threadpool(_append, file, pending.take())
            await run_in_threadpool(os.fsync, file.fileno())
            return form
        finally:
            file.close()

    def _check_room(self, size: int) -> None:
        """For a file of at least this many bytes. Raises ApiError: 413, 507."""
        limits = self._limits
        if size > limits.file_bytes:
            raise ApiError(
                413, f"a file is at most {limits.file_bytes} bytes", param="file", code="too_large"
            )
        if shutil.disk_usage(self._directory.uploads).free < limits.free_bytes:
            raise ApiError(
                507,
                f"less than {limits.free_bytes} bytes are free on the server's disk; delete files",
                code="disk_full",
            )


@dataclass
class _Pending:
    """What has come and is not written. size: its bytes. total: with what is written."""

    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    total: int = 0

    def add(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.size += len(piece)
        self.total += len(piece)

    def take(self) -> list[bytes]:
        taken, self.pieces, self.size = self.pieces, [], 0
        return taken


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", 0)


def _append(file: BinaryIO, pieces: list[bytes]) -> None:
    left = memoryview(b"".join(pieces))
    while left:
        left = left[file.write(left) :]


def _check_fields(form: Form) -> int | None:
    """How many seconds the file is to live, if that was said."""
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise ApiError(400, "purpose is missing", param="purpose")
    if purpose != BATCH:
        raise ApiError(
            400,
            f"purpose is {shown(purpose)}; this server has a use for {BATCH!r} only",
            param="purpose",
        )
    given = {key: value for key, value in form.fields.items() if key.startswith("expires_after")}
    if not given:
        return None
    seconds = given.pop("expires_after[seconds]", "")
    whole = int(seconds) if _DIGITS.fullmatch(seconds) else seconds
    life = {"anchor": given.pop("expires_after[anchor]", None), "seconds": whole} | given
    return read_seconds(life, "expires_after")
