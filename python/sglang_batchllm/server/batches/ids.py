"""Ids that cannot be guessed. They name files on the disk, so nothing else is taken for one."""

from __future__ import annotations

import re
import secrets

_FILE = re.compile(r"file-[0-9a-f]{32}")
_BATCH = re.compile(r"batch_[0-9a-f]{32}")


def new_file_id() -> str:
    return f"file-{secrets.token_hex(16)}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(16)}"


def is_file_id(text: str) -> bool:
    return _FILE.fullmatch(text) is not None


def is_batch_id(text: str) -> bool:
    return _BATCH.fullmatch(text) is not None
