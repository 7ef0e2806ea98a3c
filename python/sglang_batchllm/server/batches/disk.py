"""Writing so that it holds if the machine dies."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """What a file holds, or the names in a folder, are on the disk. May take long for a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """A file that is on the disk gets another name, on the same disk."""
    source.rename(target)
    sync(target.parent)
