"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sglang_batchllm.jobs.errors import JobError


def check_new(path: Path) -> None:
    """Raises JobError where a file is there already."""
    if path.exists():
        raise JobError(f"{path} is there already; name another place, or remove it")


def write_whole(path: Path, lines: Iterable[bytes]) -> None:
    """lines: without their ends. Raises JobError for what the disk is to blame for."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for line in lines:
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise JobError(f"{path} can't be written: {error.strerror}; name another place") from error
