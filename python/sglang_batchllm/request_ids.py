"""Ids of the requests that `run_batch` sends; the runtime reads in them what is to come."""

from __future__ import annotations

import re
import uuid
from typing import Literal, NamedTuple

_PATTERN = re.compile(r"batchllm-(once|first|later)-([0-9a-f]{32})-(\d+)-(\d+)")


class RequestId(NamedTuple):
    """turn: "once" if nothing will continue the request's text, else "first" for one of a list
    and "later" for one that came by itself. batch: the list, as of `new_batch_id`. program: which
    of the batch's programs asks. number: tells the requests of a program apart."""

    turn: Literal["once", "first", "later"]
    batch: str
    program: int
    number: int

    def __str__(self) -> str:
        return f"{self.prefix(self.turn, self.batch)}{self.program}-{self.number}"

    @staticmethod
    def prefix(turn: str, batch: str) -> str:
        """What the ids of such requests begin with."""
        return f"batchllm-{turn}-{batch}-"


def new_batch_id() -> str:
    return uuid.uuid4().hex


def parse_request_id(rid: str | None) -> RequestId | None:
    """None for the id of any other request."""
    found = _PATTERN.fullmatch(rid or "")
    if found is None:
        return None
    turn, batch, program, number = found.groups()
    return RequestId(turn, batch, int(program), int(number))  # type: ignore[arg-type]
