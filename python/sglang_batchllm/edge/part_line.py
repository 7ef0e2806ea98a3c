"""Parts of long lists that have reached the scheduler and are not taken in yet.

To take in a part of 256 requests costs as much as a decode step or more; those of texts have fewer.
So while others are served, a step takes in few requests, and what has nothing to do with the parts
that wait goes before them: requests by themselves, other lists, the end of one of these, a question
for the report. All else keeps its place behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedGenerateReqInput,
    GetInternalStateReq,
    TokenizedGenerateReqInput,
)

from sglang_batchllm.edge.messages import AbortList, NameTurns, ReleaseTexts
from sglang_batchllm.edge.packing import PackedList, emptied, ids_in
from sglang_batchllm.server.handover import SLICE

BESIDE_OTHERS = SLICE
AT_ONCE = 2 * SLICE
AT_ONCE_OF_SMALL = 16 * SLICE
"""Requests that a step takes in, beside others and while nobody else is served: who comes meanwhile
waits for them. 512 take the host less time than the GPU takes for a full prefill step. Where each
step begins MANY requests, the host has more to do than the GPU; while a list is not complete each
of them costs it a third more, and so the rest is soon taken in."""
MANY = 512

_REQUESTS = (TokenizedGenerateReqInput, BatchTokenizedGenerateReqInput, PackedList)
_GO_BEFORE = (*_REQUESTS, NameTurns, ReleaseTexts, GetInternalStateReq)
"""Unless it is a part."""


class PartLine:
    """Orders what a scheduler receives."""

    def __init__(self) -> None:
        self.step_requests = 0  # that the last prefill step began
        self._parts: deque[PackedList] = deque()

    def __len__(self) -> int:
        return len(self._parts)

    def order(self, received: Sequence[Any], serves_others: Callable[[], bool]) -> list[Any]:
        """What to process before the next step, in this order. serves_others: whether anything but
        lists in parts runs or waits."""
        due: list[Any] = []
        others_come = False
        for message in received:
            if isinstance(message, PackedList) and message.part is not None:
                self._parts.append(message)
                continue
            others_come |= isinstance(message, _REQUESTS)
            if not self._goes_before(message):
                due += self._parts
                self._parts.clear()
            due.append(message)
        if self._parts:
            alone = not others_come and not serves_others()
            due += self._take(self._at_once() if alone else BESIDE_OTHERS)
        return due

    def _at_once(self) -> int:
        return AT_ONCE_OF_SMALL if self.step_requests >= MANY else AT_ONCE

    def _goes_before(self, message: Any) -> bool:
        if isinstance(message, AbortReq):  # of all whose ids begin with its own
            start = "" if message.abort_all else message.rid or ""
            return not any(rid.startswith(start) for part in self._parts for rid in ids_in(part))
        return isinstance(message, _GO_BEFORE) or (
            isinstance(message, AbortList) and self._drop(message)
        )

    def _take(self, requests: int) -> list[PackedList]:
        """At least one part, and no more requests otherwise."""
        taken: list[PackedList] = []
        while self._parts and (not taken or len(self._parts[0].lengths) <= requests):
            taken.append(self._parts.popleft())
            requests -= len(taken[-1].lengths)
        return taken

    def _drop(self, aborts: AbortList) -> bool:
        """Take the requests out of the parts that wait and out of `aborts`, if that is all there is
        to do for them: nobody awaits an answer, and none of these parts keeps others."""
        gone = set(aborts.rids)
        leaving = [gone.intersection(ids_in(part)) for part in self._parts]
        whole = [
            len(ids) in (0, len(part.lengths))
            for ids, part in zip(leaving, self._parts, strict=True)
        ]
        dropped = set().union(*leaving)
        if not all(whole) or not dropped.isdisjoint(aborts.awaited):
            return False
        self._parts = deque(
            emptied(part) if ids else part for ids, part in zip(leaving, self._parts, strict=True)
        )
        aborts.rids = [rid for rid in aborts.rids if rid not in dropped]
        return True
