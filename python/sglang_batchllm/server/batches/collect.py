"""A batch whose end is certain: its results become files, and it has ended."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_batchllm.server.batches.batch_store import Batches, BatchRecord
from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.disk import move, sync


def output_path(directory: Directory, batch_id: str) -> Path:
    """Answers, in the making."""
    return directory.run(batch_id) / "output.jsonl"


def error_path(directory: Directory, batch_id: str) -> Path:
    """Errors, in the making."""
    return directory.run(batch_id) / "errors.jsonl"


def collect(directory: Directory, batches: Batches, record: BatchRecord) -> None:
    """After `Batches.decide`. May be interrupted anywhere, and is then called again."""
    output = _publish(output_path(directory, record.id), directory.content(record.output_id))
    errors = _publish(error_path(directory, record.id), directory.content(record.error_id))
    batches.end(record.id, output, errors)
    shutil.rmtree(directory.run(record.id), ignore_errors=True)


def _publish(made: Path, content: Path) -> int:
    """The bytes of the file, 0 where there is none. One that was moved before stays."""
    if made.exists() and made.stat().st_size:
        sync(made)
        move(made, content)
    return content.stat().st_size if content.exists() else 0
