"""Result files: a JSON list with one row per run, each of which says where it is from.

A row names its case and side, its metrics in their units, and the date, device, versions, commit
and command that gave it, so that whoever quotes it need not look elsewhere.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COMMIT_VARIABLE = "GIT_COMMIT"
"""Says the commit where the benchmark runs on a copy of the sources without their history."""


class ResultFile:
    """Rows in a file, written after each of them, so that what ends early leaves what it has.

    path: None for rows that are kept nowhere. key: the fields that tell runs apart; a new row
    replaces the row of an earlier command that agrees in them, and all others stay.
    Raises ValueError if the file holds anything but a list of rows.
    """

    def __init__(self, path: Path | None, key: Sequence[str]):
        self._path, self._key = path, key
        self._rows: list[Row] = []
        if path is not None and path.exists():
            self._rows = json.loads(path.read_text())
            if not isinstance(self._rows, list):
                raise ValueError(f"{path} is no list of result rows: name another file with --out")

    def add(self, row: Row) -> Row:
        """The row with its origin, once it is in the file."""
        row = {**row, **origin()}
        key = [row[field] for field in self._key]
        same = [other for other in self._rows if [other.get(f) for f in self._key] == key]
        if same:
            self._rows[self._rows.index(same[0])] = row
        else:
            self._rows.append(row)
        if self._path is not None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._rows, indent=1) + "\n")
            partial.replace(self._path)
        return row


@functools.cache
def origin() -> dict[str, str]:
    """Date, device, versions, commit and command of this process's rows."""
    command = ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    return {
        "date": date.today().isoformat(),
        "device": _device(),
        "versions": ", ".join(
            f"{package} {importlib.metadata.version(package)}"
            for package in ("sglang", "torch", "triton")
        ),
        "commit": os.environ.get(COMMIT_VARIABLE) or _commit(),
        "command": " ".join(command),
    }


def _device() -> str:
    """The GPUs, or the processor where there is none. Asks no CUDA context of this process."""
    try:
        query = ["--query-gpu=name", "--format=csv,noheader"]
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")  # which nvidia-smi does not ask
        names = _output("nvidia-smi", *query, *(["-i", seen] if seen else [])).splitlines()
        return " + ".join(names)
    except (OSError, subprocess.CalledProcessError):
        pass
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"


def _commit() -> str:
    try:
        return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()
