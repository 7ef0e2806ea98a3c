"""Batches: what clients asked for, and how far it is."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_batchllm.server.batches.database import Database
from sglang_batchllm.server.batches.errors import ApiError
from sglang_batchllm.server.batches.file_store import (
    BATCH,
    BATCH_OUTPUT,
    FileRecord,
    find,
    insert,
    place,
)
from sglang_batchllm.server.batches.ids import is_batch_id, new_batch_id, new_file_id
from sglang_batchllm.server.batches.limits import HOUR, Limits
from sglang_batchllm.server.batches.states import OPEN, OPEN_SQL, Outcome

_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
"""States whose beginning is kept."""


@dataclass(frozen=True)
class Order:
    """What a client asks for. output_seconds: how long the results live, if it said."""

    input_file_id: str
    endpoint: str
    hours: int
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None


@dataclass(frozen=True)
class BatchRecord:
    """What is known of a batch.

    output_id, error_id: of the files that its results become. outcome: how it ends, once that is
    certain, while results may have yet to become files. errors: why it failed. times: when it came
    into which state.
    """

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_id: str
    error_id: str
    status: str
    outcome: Outcome | None
    errors: list[dict[str, Any]] | None
    output_file_id: str | None
    error_file_id: str | None
    total: int
    completed: int
    failed: int
    created_at: int
    expires_at: int
    times: dict[str, int]

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def to_json(self) -> dict[str, Any]:
        errors = None if self.errors is None else {"object": "list", "data": self.errors}
        counts = {"total": self.total, "completed": self.completed, "failed": self.failed}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{state}_at": self.times.get(state) for state in _TIMES},
            "request_counts": counts,
            "metadata": self.metadata,
        }


class Batches:
    """clock: seconds since 1970."""

    def __init__(self, database: Database, limits: Limits, clock: Callable[[], float]):
        self._database = database
        self._limits = limits
        self._clock = clock

    # For clients

    def create(self, order: Order) -> BatchRecord:
        """Raises ApiError: 404 for a file that is not there, 400 for one that is no input, 429 for
        one batch too many."""
        now = int(self._clock())
        columns = {
            "id": new_batch_id(),
            "endpoint": order.endpoint,
            "input_file_id": order.input_file_id,
            "completion_window": f"{order.hours}h",
            "metadata": None if order.metadata is None else json.dumps(order.metadata),
            "output_seconds": order.output_seconds or self._limits.file_seconds,
            "output_id": new_file_id(),
            "error_id": new_file_id(),
            "status": "validating",
            "created_at": now,
            "expires_at": now + order.hours * HOUR,
        }
        with self._database.writing() as connection:
            if find(connection, order.input_file_id).purpose != BATCH:
                raise ApiError(
                    400,
                    f"the input of a batch is a file of purpose {BATCH!r}",
                    param="input_file_id",
                )
            (count,) = connection.execute(
                f"SELECT count(*) FROM batches WHERE {OPEN_SQL}"
            ).fetchone()
            if count >= self._limits.open_batches:
                raise ApiError(
                    429,
                    f"the server has at most {self._limits.open_batches} batches that have not "
                    "ended; cancel some, or wait",
                    code="too_many_batches",
                )
            marks = ", ".join("?" * len(columns))
            connection.execute(
                f"INSERT INTO batches ({', '.join(columns)}) VALUES ({marks})", [*columns.values()]
            )
            return _find(connection, columns["id"])

    def get(self, batch_id: str) -> BatchRecord:
        """Raises ApiError (404)."""
        with self._database.reading() as connection:
            return _find(connection, batch_id)

    def page(self, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """See `Files.page`; the newest come first."""
        condition, values = "1", []
        with self._database.reading() as connection:
            if after is not None:
                condition = "number < ?"
                values.append(place(connection, "batches", after))
            rows = connection.execute(
                f"SELECT * FROM batches WHERE {condition} ORDER BY number DESC LIMIT ?",
                [*values, limit + 1],
            ).fetchall()
        return [_record(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, batch_id: str) -> BatchRecord:
        """Raises ApiError: 404, or 409 for one whose results are complete."""
        with self._database.writing() as connection:
            record = _find(connection, batch_id)
            if record.status in ("validating", "in_progress"):
                self._set_status(connection, batch_id, "cancelling")
            elif record.status != "cancelling":
                raise ApiError(
                    409,
                    f"{batch_id} is {record.status} and cannot be cancelled",
                    code="not_cancellable",
                )
            return _find(connection, batch_id)

    # For who runs them

    def open(self) -> list[BatchRecord]:
        """Those that have not ended, the oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(
                f"SELECT * FROM batches WHERE {OPEN_SQL} ORDER BY number"
            ).fetchall()
        return [_record(row) for row in rows]

    def begin(self, batch_id: str) -> None:
        """Its requests have been read."""
        with self._database.writing() as connection:
            if _find(connection, batch_id).status == "validating":
                self._set_status(connection, batch_id, "in_progress")

    def count(self, batch_id: str, total: int, completed: int, failed: int) -> None:
        """Requests of it, those that were answered, and those that have an error."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE batches SET total = ?, completed = ?, failed = ? WHERE id = ?",
                [total, completed, failed, batch_id],
            )

    def decide(
        self, batch_id: str, outcome: Outcome, errors: list[dict[str, Any]] | None = None
    ) -> None:
        """It ends like this, unless that was certain before. One that a client has cancelled is
        cancelled, whatever came of it since.

        errors: of OpenAI's form, for one that failed.
        """
        with self._database.writing() as connection:
            record = _find(connection, batch_id)
            if not record.is_open or record.outcome is not None:
                return
            if record.status == "cancelling":
                outcome, errors = "cancelled", None
            connection.execute(
                "UPDATE batches SET outcome = ?, errors = ? WHERE id = ?",
                [outcome, None if errors is None else json.dumps(errors), batch_id],
            )
            if outcome in ("completed", "expired"):
                self._set_status(connection, batch_id, "finalizing")

    def end(self, batch_id: str, output_bytes: int, error_bytes: int) -> None:
        """What it was decided to end like has come true; its results are in place. Empty ones are
        no files."""
        with self._database.writing() as connection:
            record = _find(connection, batch_id)
            if not record.is_open or record.outcome is None:
                return
            now = int(self._clock())
            (seconds,) = connection.execute(
                "SELECT output_seconds FROM batches WHERE id = ?", [batch_id]
            ).fetchone()
            for kind, file_id, size in (
                ("output", record.output_id, output_bytes),
                ("error", record.error_id, error_bytes),
            ):
                if size:
                    name = f"{batch_id}_{kind}.jsonl"
                    insert(
                        connection,
                        FileRecord(file_id, BATCH_OUTPUT, name, size, now, now + seconds),
                    )
                    connection.execute(
                        f"UPDATE batches SET {kind}_file_id = ? WHERE id = ?", [file_id, batch_id]
                    )
            self._set_status(connection, batch_id, record.outcome)

    def _set_status(self, connection: sqlite3.Connection, batch_id: str, status: str) -> None:
        connection.execute(
            f"UPDATE batches SET status = ?, {status}_at = ? WHERE id = ?",
            [status, int(self._clock()), batch_id],
        )


def _find(connection: sqlite3.Connection, batch_id: str) -> BatchRecord:
    row = None
    if is_batch_id(batch_id):
        row = connection.execute("SELECT * FROM batches WHERE id = ?", [batch_id]).fetchone()
    if row is None:
        raise ApiError(404, "there is no batch of this id", code="not_found")
    return _record(row)


def _record(row: sqlite3.Row) -> BatchRecord:
    times = {state: row[f"{state}_at"] for state in _TIMES if row[f"{state}_at"] is not None}
    return BatchRecord(
        id=row["id"],
        endpoint=row["endpoint"],
        input_file_id=row["input_file_id"],
        completion_window=row["completion_window"],
        metadata=None if row["metadata"] is None else json.loads(row["metadata"]),
        output_id=row["output_id"],
        error_id=row["error_id"],
        status=row["status"],
        outcome=row["outcome"],
        errors=None if row["errors"] is None else json.loads(row["errors"]),
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        total=row["total"],
        completed=row["completed"],
        failed=row["failed"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        times=times,
    )
