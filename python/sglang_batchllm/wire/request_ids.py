"""Ids that a hand-over gives: its own, and those of requests that its programs send later."""

from __future__ import annotations

import re
import uuid
from typing import Literal, NamedTuple

_BATCH = re.compile(r"[0-9a-f]{32}")
_PATTERN = re.compile(r"batchllm-(once|first|later)-([0-9a-f]{32})-([0-9]{1,18})-([0-9]{1,18})")


class RequestId(NamedTuple):
    """turn: "once" if nothing will continue the request's text, else "first" for one of a list
    and "later" for one that came by itself. batch: the list, as of `new_batch_id`. program: which
    of the batch's programs asks. number: tells the requests of a program apart.

    An id says what its sender claims, and anyone can send it: whether the claim holds is for
    `server.registry.Registry` to say."""

    turn: Literal["once", "first", "later"]
    batch: str
    program: int
    number: int

    def __str__(self) -> str:
        return f"batchllm-{self.turn}-{self.batch}-{self.program}-{self.number}"


def new_batch_id() -> str:
    return uuid.uuid4().hex


def is_batch_id(batch: str) -> bool:
    """Whether it looks like one of `new_batch_id`."""
    return _BATCH.fullmatch(batch) is not None


def parse_request_id(rid: str | None) -> RequestId | None:
    """None for the id of any other request."""
    found = _PATTERN.fullmatch(rid or "")
    if found is None:
        return None
    turn, batch, program, number = found.groups()
    return RequestId(turn, batch, int(program), int(number))  # type: ignore[arg-type]
