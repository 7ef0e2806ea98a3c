"""What nobody needs any more goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from sglang_batchllm.server.batches.database import Database
from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.ids import is_batch_id, is_file_id
from sglang_batchllm.server.batches.limits import DAY, Limits
from sglang_batchllm.server.batches.states import OPEN_SQL


def sweep(
    database: Database, directory: Directory, limits: Limits, clock: Callable[[], float]
) -> None:
    """Files that have expired, unless an open batch reads them, and records that are too old.
    A file that was deleted is remembered for a day: the lists that clients page through go on."""
    now = int(clock())
    with database.writing() as connection:
        connection.execute(
            "UPDATE files SET deleted_at = ? WHERE deleted_at IS NULL AND expires_at <= ? AND id "
            f"NOT IN (SELECT input_file_id FROM batches WHERE {OPEN_SQL})",
            [now, now],
        )
        gone = [
            row["id"]
            for row in connection.execute("SELECT id FROM files WHERE deleted_at IS NOT NULL")
        ]
    for file_id in gone:
        directory.content(file_id).unlink(missing_ok=True)
    with database.writing() as connection:
        connection.execute("DELETE FROM files WHERE deleted_at <= ?", [now - DAY])
        connection.execute(
            f"DELETE FROM batches WHERE NOT {OPEN_SQL} AND max(ifnull(completed_at, 0), "
            "ifnull(failed_at, 0), ifnull(expired_at, 0), ifnull(cancelled_at, 0)) <= ?",
            [now - limits.record_seconds],
        )


def remove_left_overs(database: Database, directory: Directory) -> None:
    """What a server that ended suddenly had begun and nothing refers to. Before uploads begin.
    Only names that were made here: the directory may have been there before."""
    with database.reading() as connection:
        files = connection.execute(
            "SELECT id FROM files WHERE deleted_at IS NULL "
            f"UNION SELECT output_id FROM batches WHERE {OPEN_SQL} "
            f"UNION SELECT error_id FROM batches WHERE {OPEN_SQL}"
        ).fetchall()
        runs = connection.execute(f"SELECT id FROM batches WHERE {OPEN_SQL}").fetchall()
    known = {row["id"] for row in files}
    for path in (*directory.contents.iterdir(), *directory.uploads.iterdir()):
        left = path.parent == directory.uploads or path.name not in known
        if left and is_file_id(path.name):
            path.unlink(missing_ok=True)
    open_runs = {row["id"] for row in runs}
    for path in directory.runs.iterdir():
        if path.name not in open_runs and is_batch_id(path.name):
            shutil.rmtree(path, ignore_errors=True)
