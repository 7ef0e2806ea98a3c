"""Lists that come in parts: what is here first runs while the others are on their way.

The first part is planned as it comes, and the whole list once it is complete. Requests of the first
plan that wait, run or have ended by then are in the last one, too, so that it is the plan that the
list would have got in one piece. In between there is another plan only where what waits of the list
does not fill a prefill step and as much has come as was planned: so planning costs no more than
twice as much.

While parts are missing nobody knows who else shares what, and all prompts that have run stay in the
cache as a whole; see `Batch.opening`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_batchllm.policy.admission.outputs import OutputLengths
from sglang_batchllm.policy.batch import Batch, Member, member_of
from sglang_batchllm.policy.distinct import DistinctTokens
from sglang_batchllm.policy.requests import Request
from sglang_batchllm.policy.step import Limits

SHARE = 4
"""A list that is not complete is planned while that takes one part of so many of the KV pool."""


class Part(NamedTuple):
    """Of a list. name: no other list's. last: the list is complete."""

    name: str
    last: bool


Plan = Callable[[Sequence[Member], bool, Batch | None], Batch]
"""Plans requests together; the flag says that they were handed over in one call. The batch, if any,
is the one that this one follows."""


@dataclass
class Planned:
    """What follows from plans that were made.

    anew: whether any was. moved: requests that run and are in another plan now. waiting: those that
    can run and do not. complete: batches of which nothing more comes, and that stay as they are.
    """

    anew: bool = False
    moved: list[Request] = field(default_factory=list)
    waiting: list[Member] = field(default_factory=list)
    complete: list[Batch] = field(default_factory=list)


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

    def due(self, limits: Limits) -> bool:
        """Whether it is time to plan."""
        if self.complete:
            return True
        if len(self.coming) < max(len(self.planned), 2):
            return False
        if self.batch is not None and self.batch.tokens_waiting() >= limits.chunk:
            return False
        for member in self.coming[self._measured :]:
            request = member.request
            self._distinct.add(request.origin_input_ids, request.extra_key)
        self._measured = len(self.coming)
        return self._distinct.count() * SHARE <= limits.capacity

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

    def __init__(
        self,
        limits: Limits,
        plan: Plan,
        start_again: Callable[[Member], None],
        lengths: OutputLengths,
    ) -> None:
        """start_again: called with each request that runs, once another plan has taken it over."""
        self._limits = limits
        self._plan = plan
        self._start_again = start_again
        self._lengths = lengths
        self._lists: dict[str, PartedList] = {}

    def add(self, part: Part, members: Sequence[Member]) -> PartedList:
        parted = self._lists.setdefault(part.name, PartedList(self._limits.page_size))
        parted.add(members, part.last)
        return parted

    def unplanned(self, member: Member) -> PartedList | None:
        """The list that the request will be planned with."""
        if member.batch is None:
            for parted in self._lists.values():
                if member in parted.coming:
                    return parted
        return None

    def plan_due(self) -> Planned:
        """Plan those for which it is time; complete ones once."""
        planned = Planned()
        due = [parted for parted in self._lists.values() if parted.due(self._limits)]
        if due:
            self._lists = {
                name: parted for name, parted in self._lists.items() if not parted.complete
            }
        for parted in due:
            parted.drop_gone()
            if parted.coming:
                self._plan_again(parted, planned)
            elif parted.batch is not None:  # and complete
                parted.batch.opening = False
                planned.complete.append(parted.batch)
        return planned

    def _plan_again(self, parted: PartedList, planned: Planned) -> None:
        old = parted.batch
        running = [member for member in parted.planned if member.slot >= 0]
        ended = [member for member in parted.planned if not is_present(member)]
        parted.all_planned()
        if len(parted.planned) > 1:
            batch = parted.batch = self._plan(parted.planned, True, old)
            batch.opening = not parted.complete
            batch.take_over(ended + running)
            for member in running:
                self._start_again(member)
            for member in ended:
                batch.end(member, was_running=False, free=False)
            if old is not None:
                old.dissolve(self._lengths)
        planned.anew = True
        planned.moved += [member.request for member in running]
        planned.waiting += parted.to_queue()


def is_present(member: Member) -> bool:
    """Whether the request has not ended."""
    return member_of(member.request) is member
