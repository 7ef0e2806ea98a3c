"""Files that clients left, and those that batches left for them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_batchllm.server.batches.database import Database
from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.disk import move
from sglang_batchllm.server.batches.errors import ApiError
from sglang_batchllm.server.batches.ids import is_file_id
from sglang_batchllm.server.batches.limits import Limits
from sglang_batchllm.server.batches.states import OPEN_SQL

BATCH = "batch"
"""The purpose of requests for a batch, the only one that uploads can have."""

BATCH_OUTPUT = "batch_output"
"""The purpose of results."""


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file. filename: as the client named it; it names nothing here."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """clock: seconds since 1970."""

    def __init__(
        self, database: Database, directory: Directory, limits: Limits, clock: Callable[[], float]
    ):
        self._database = database
        self._directory = directory
        self._limits = limits
        self._clock = clock

    def keep_upload(self, file_id: str, filename: str, seconds: int | None) -> FileRecord:
        """What was uploaded under this id is whole, and on the disk.

        seconds: how long it lives, if the client said. Raises ApiError (429) for one file too many.
        """
        source = self._directory.upload(file_id)
        with self._database.writing() as connection:
            (count,) = connection.execute(
                "SELECT count(*) FROM files WHERE deleted_at IS NULL"
            ).fetchone()
            if count >= self._limits.files:
                raise ApiError(
                    429,
                    f"the server keeps at most {self._limits.files} files; delete some first",
                    code="too_many_files",
                )
            now = int(self._clock())
            expires_at = now + (self._limits.file_seconds if seconds is None else seconds)
            size = source.stat().st_size
            record = FileRecord(file_id, BATCH, filename, size, now, expires_at)
            insert(connection, record)
            move(source, self._directory.content(file_id))
        return record

    def get(self, file_id: str) -> FileRecord:
        """Raises ApiError (404)."""
        with self._database.reading() as connection:
            return find(connection, file_id)

    def page(
        self, after: str | None, limit: int, descending: bool, purpose: str | None
    ) -> tuple[list[FileRecord], bool]:
        """A page, and whether there are more.

        after: the last file of the page before, which may have been deleted since. Raises ApiError
        (400) where there was none.
        """
        direction, order = ("<", "DESC") if descending else (">", "ASC")
        condition, values = "deleted_at IS NULL", []
        with self._database.reading() as connection:
            if after is not None:
                condition += f" AND number {direction} ?"
                values.append(place(connection, "files", after))
            if purpose is not None:
                condition += " AND purpose = ?"
                values.append(purpose)
            rows = connection.execute(
                f"SELECT * FROM files WHERE {condition} ORDER BY number {order} LIMIT ?",
                [*values, limit + 1],
            ).fetchall()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Raises ApiError: 404, or 409 for one that an open batch reads."""
        with self._database.writing() as connection:
            find(connection, file_id)
            reader = connection.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND {OPEN_SQL}", [file_id]
            ).fetchone()
            if reader is not None:
                raise ApiError(
                    409,
                    f"{file_id} is the input of {reader['id']}, which has not ended; cancel that "
                    "first, or wait",
                    code="file_in_use",
                )
            connection.execute(
                "UPDATE files SET deleted_at = ? WHERE id = ?", [int(self._clock()), file_id]
            )
        self._directory.content(file_id).unlink(missing_ok=True)


def find(connection: sqlite3.Connection, file_id: str) -> FileRecord:
    """Raises ApiError (404)."""
    row = None
    if is_file_id(file_id):
        row = connection.execute(
            "SELECT * FROM files WHERE id = ? AND deleted_at IS NULL", [file_id]
        ).fetchone()
    if row is None:
        raise ApiError(404, "there is no file of this id; it may have expired", code="not_found")
    return _record(row)


def place(connection: sqlite3.Connection, table: str, after: str) -> int:
    """Where a list goes on. Raises ApiError (400)."""
    row = connection.execute(f"SELECT number FROM {table} WHERE id = ?", [after]).fetchone()
    if row is None:
        raise ApiError(400, "after is the id of the last object of a page", param="after")
    return row["number"]


def insert(connection: sqlite3.Connection, record: FileRecord) -> None:
    connection.execute(
        "INSERT INTO files (id, purpose, filename, bytes, created_at, expires_at) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        [
            record.id,
            record.purpose,
            record.filename,
            record.bytes,
            record.created_at,
            record.expires_at,
        ],
    )


def _record(row: sqlite3.Row) -> FileRecord:
    return FileRecord(
        row["id"],
        row["purpose"],
        row["filename"],
        row["bytes"],
        row["created_at"],
        row["expires_at"],
    )
