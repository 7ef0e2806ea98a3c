"""What the server tells its worker."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Task:
    """directory: of the files. url, api_key, verify: see `jobs.server.Server`. log_level: as
    `logging` counts."""

    directory: str
    url: str
    api_key: str | None
    verify: bool | str
    log_level: int

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Task:
        return cls(**json.loads(line))
