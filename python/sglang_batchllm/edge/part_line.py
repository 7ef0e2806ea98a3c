"""Parts of long lists that have reached the scheduler and are not taken in yet.

To take in a part costs as much as a step or more. So while others are served, a step takes in one,
and requests by themselves go before those that wait; all else keeps its place behind them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

from sglang_batchllm.edge.messages import AbortList
from sglang_batchllm.edge.packing import PackedList, emptied, ids_in

AT_ONCE = 8
"""Parts that a step takes in while nobody else is served: who comes meanwhile waits for them."""


class PartLine:
    """Orders what a scheduler receives."""

    def __init__(self) -> None:
        self._parts: deque[PackedList] = deque()

    def __len__(self) -> int:
        return len(self._parts)

    def order(self, received: Sequence[Any], serves_others: Callable[[], bool]) -> list[Any]:
        """What to process before the next step, in this order. serves_others: whether anything but
        lists in parts runs or waits."""
        due: list[Any] = []
        comes_alone = False
        for message in received:
            if isinstance(message, PackedList) and message.part is not None:
                self._parts.append(message)
                continue
            if isinstance(message, TokenizedGenerateReqInput):
                comes_alone = True
            elif not (isinstance(message, AbortList) and self._drop(message)):
                due += self._take(len(self._parts))
            due.append(message)
        if self._parts:
            due += self._take(1 if comes_alone or serves_others() else AT_ONCE)
        return due

    def _take(self, count: int) -> list[PackedList]:
        return [self._parts.popleft() for _ in range(min(count, len(self._parts)))]

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
