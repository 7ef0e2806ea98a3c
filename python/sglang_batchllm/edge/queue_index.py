"""Waiting requests by their ids: an abort looks at what it ends, not at all that wait."""

from __future__ import annotations

from bisect import bisect_left

from sglang.srt.managers.schedule_batch import Req

FEW = 8
"""Requests up to which it is faster to find each in the queue than to go over all of it once."""


class QueueIndex:
    """The requests in SGLang's waiting queue, found by how their ids begin."""

    def __init__(self) -> None:
        self._requests: dict[str, Req] = {}
        self._sorted: list[str] = []  # ids, also of requests that are gone
        self._unsorted: list[str] = []

    def add(self, req: Req) -> None:
        self._requests[req.rid] = req
        self._unsorted.append(req.rid)

    def discard(self, req: Req) -> None:
        self._requests.pop(req.rid, None)

    def get(self, rid: str) -> Req | None:
        return self._requests.get(rid)

    def beginning_with(self, start: str) -> list[Req]:
        if self._unsorted:
            known = {*self._sorted, *self._unsorted}
            self._sorted = sorted(known.intersection(self._requests))
            self._unsorted = []
        found = []
        for at in range(bisect_left(self._sorted, start), len(self._sorted)):
            rid = self._sorted[at]
            if not rid.startswith(start):
                break
            req = self._requests.get(rid)
            if req is not None:
                found.append(req)
        return found


def without(queue: list[Req], leaving: set[Req]) -> list[Req]:
    """The queue less these; the same list, shortened, where that is faster."""
    if len(leaving) > FEW:
        return [req for req in queue if req not in leaving]
    for req in leaving:
        del queue[queue.index(req)]
    return queue
