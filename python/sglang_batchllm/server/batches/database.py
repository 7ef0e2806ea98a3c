"""The state of files and batches, in SQLite: the server and its worker both have it open."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_batchllm.server.batches.directory import DirectoryError

VERSION = 1
"""Of the schema."""

BUSY_SECONDS = 30
"""How long a write waits for that of the other process. Each takes milliseconds."""

_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    deleted_at INTEGER
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT,
    output_seconds INTEGER NOT NULL,
    output_id TEXT NOT NULL,
    error_id TEXT NOT NULL,
    status TEXT NOT NULL,
    outcome TEXT,
    errors TEXT,
    output_file_id TEXT,
    error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
);
CREATE INDEX open_batches ON batches (number)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
"""


class Database:
    """One connection, for all threads of a process."""

    def __init__(self, path: Path):
        """Raises DirectoryError for a file that is not ours, or of a newer version."""
        self._connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._make_schema(path)
        except sqlite3.Error as error:
            self._connection.close()
            raise DirectoryError(
                f"{path} cannot be used: {error}; name another directory."
            ) from None

    def _make_schema(self, path: Path) -> None:
        with self.writing() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise DirectoryError(
                    f"{path} was written by a newer version of sglang-batchllm (schema {version}, "
                    f"known here: {VERSION}); use that version, or name another directory."
                )
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is on the disk when it ends, and undone if it raises."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()
