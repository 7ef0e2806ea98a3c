"""What the command line names as input, as batch files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.table import Prompts, is_table, write_requests
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS


@dataclass(frozen=True)
class Source:
    """inputs: batch files. table: what they were made from, where that is one."""

    inputs: tuple[Path, ...]
    table: Path | None = None

    def records(self, output: Path) -> Path:
        """Where the records go."""
        return output if self.table is None else _beside(output, "records.jsonl")


def open_source(
    names: Sequence[str],
    beside: Path,
    *,
    prompt_column: str | None,
    template: str | None,
    endpoint: str,
) -> Source:
    """names: files, or - for standard input. beside: a path next to which files may be made.
    Raises JobError."""
    if "-" in names:
        if len(names) > 1:
            raise JobError("-i - reads standard input, and stands alone")
        copy = _beside(beside, "requests.jsonl")
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return Source((copy,))
    paths = tuple(map(Path, names))
    for path in paths:
        if not path.is_file():
            raise JobError(f"{path} is not a file; name one with requests")
    _check_room(paths, beside)
    tables = [path for path in paths if is_table(path)]
    if not tables:
        if prompt_column is not None or template is not None:
            raise JobError(f"{names[0]} is no table (.parquet, .csv), so it has no columns")
        return Source(paths)
    if len(paths) > 1:
        raise JobError("a table stands alone; run one after the other")
    requests = _beside(beside, "requests.jsonl")
    url = CHAT if endpoint == "chat" else COMPLETIONS
    write_requests(tables[0], Prompts(prompt_column, template), url, requests)
    return Source((requests,), tables[0])


def check_writable(path: Path) -> None:
    """Raises JobError where no file can be written there."""
    if path.is_dir():
        raise JobError(f"{path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise JobError(f"{path} can't be written: there is no folder {path.parent}; make it")
    probe = path if path.exists() else path.absolute().parent
    if not os.access(probe, os.W_OK):
        raise JobError(f"{path} can't be written: permission denied; name another file")


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _check_room(paths: Sequence[Path], beside: Path) -> None:
    """Prompts take as much room as their file, or less."""
    needed = sum(path.stat().st_size for path in paths)
    folder = beside.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise JobError(
            f"{folder} has {free >> 20} MiB free, and planning takes {needed >> 20} MiB there; "
            "make room, or name an output on another disk"
        )
