"""Lists that come in parts: what is here first runs while the others are on their way.

The first part is planned as it comes, and the whole list once it is complete. Requests of the first
plan that wait, run or have ended by then are in the last one, too, so that it is the plan that the
list would have got in one piece. In between there is another plan only where nothing of the list
waits any more and as much has come as was planned: so planning costs no more than twice as much.

While parts are missing nobody knows who else shares what, and all prompts that have run stay in the
cache as a whole; see `Batch.opening`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sglang_batchllm.policy.batch import Batch, Member, member_of
from sglang_batchllm.policy.distinct import DistinctTokens

SHARE = 4
"""A list that is not complete is planned while that takes one part of so many of the KV pool."""


class Part(NamedTuple):
    """Of a list. name: no other list's. last: the list is complete."""

    name: str
    last: bool


class PartedList:
    """What has come of a list.

    batch: the last plan, with `planned`; None before the first. coming: what has come since.
    """

    def __init__(self, page_size: int) -> None:
        self.batch: Batch | None = None
        self.planned: list[Member] = []
        self.coming: list[Member] = []
        self.complete = False
        self._distinct = DistinctTokens(page_size)  # of the first `_measured` that were coming
        self._measured = 0
        self._queued: set[int] = set()  # those that can run, by identity

    def add(self, members: Sequence[Member], last: bool) -> None:
        self.coming += members
        self.complete = last

    def may_run(self, member: Member) -> None:
        """A request of the list can run; that of a grammar can not while it is compiled."""
        self._queued.add(id(member))

    def due(self, capacity: int) -> bool:
        """Whether it is time to plan. capacity: tokens of the KV pool."""
        if self.complete:
            return True
        starves = self.batch is None or not self.batch.waiting.count
        if not starves or len(self.coming) < max(len(self.planned), 2):
            return False
        for member in self.coming[self._measured :]:
            request = member.request
            self._distinct.add(request.origin_input_ids, request.extra_key)
        self._measured = len(self.coming)
        return self._distinct.count() * SHARE <= capacity

    def all_planned(self) -> None:
        """What was coming and has not left since is in the plan now."""
        self.planned += self.coming
        self.coming = []
        self._measured = 0

    def drop_gone(self) -> None:
        """Requests that have left before they were planned never come."""
        self._queued.difference_update(id(one) for one in self.coming if not is_present(one))
        self.coming = [member for member in self.coming if is_present(member)]

    def to_queue(self) -> Iterator[Member]:
        """Those that can run and do not."""
        for member in self.planned:
            if id(member) in self._queued and member.slot < 0 and is_present(member):
                yield member


class Parts:
    """The lists of which parts are missing, and those just completed."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._lists: dict[str, PartedList] = {}

    def add(self, part: Part, members: Sequence[Member]) -> PartedList:
        parted = self._lists.setdefault(part.name, PartedList(self._page_size))
        parted.add(members, part.last)
        return parted

    def unplanned(self, member: Member) -> PartedList | None:
        """The list that the request will be planned with."""
        if member.batch is None:
            for parted in self._lists.values():
                if member in parted.coming:
                    return parted
        return None

    def due(self, capacity: int) -> list[PartedList]:
        """Those to plan now; complete ones are handed out once."""
        due = [parted for parted in self._lists.values() if parted.due(capacity)]
        if due:
            self._lists = {
                name: parted for name, parted in self._lists.items() if not parted.complete
            }
        return due


def is_present(member: Member) -> bool:
    """Whether the request has not ended."""
    return member_of(member.request) is member
