"""From requests to planned batches: lists at once, lone requests as they gather."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from sglang_batchllm.policy.batch import Batch, Member

LaneName = Literal["later", "lists", "gathered", "single", "yielding"]
LANES: list[LaneName] = ["lists", "gathered", "single"]
"""Those that take turns. Later turns of programs go before them, lists that yield after them."""

QUIET_SECONDS = 0.002
"""A gathering closes early once nothing has arrived for this long."""

Plan = Callable[[Sequence[Member], bool], Batch]
"""Plans requests together; the flag says whether they were handed over in one call."""


class Lane:
    """Batches of which requests wait, oldest first."""

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}

    def add(self, batch: Batch) -> None:
        self._batches[batch.number] = batch

    def batches(self) -> list[Batch]:
        for number in [n for n, batch in self._batches.items() if not batch.waiting.count]:
            del self._batches[number]
        return [self._batches[number] for number in sorted(self._batches)]

    def __bool__(self) -> bool:
        return any(batch.waiting.count for batch in self._batches.values())


class Gathering:
    """Requests that arrived alone and are not planned yet."""

    def __init__(self, seconds: float):
        """seconds: how long one waits at most for others."""
        self._seconds = seconds
        self._members: dict[int, Member] = {}  # by identity
        self._first = self._last = 0.0

    def __bool__(self) -> bool:
        return bool(self._members)

    def add(self, member: Member) -> None:
        self._last = time.monotonic()
        if not self._members:
            self._first = self._last
        self._members[id(member)] = member

    def discard(self, member: Member) -> None:
        self._members.pop(id(member), None)

    @property
    def due(self) -> bool:
        now = time.monotonic()
        return now - self._first >= self._seconds or now - self._last >= QUIET_SECONDS

    def close(self) -> list[Member]:
        members, self._members = [*self._members.values()], {}
        return members


class Intake:
    """Every request that waits, by how it is to be scheduled.

    A request that arrives alone joins a gathering, which is planned together after
    `gather_seconds` at most, or when arrivals pause, but not before the gathered requests ahead of
    it are all scheduled: until then waiting costs nothing and the plan only gets better. Later
    turns gather by themselves, and wait for nobody.
    """

    def __init__(self, plan: Plan, gather_seconds: float, agree: Callable[[bool], bool]):
        """agree: makes a decision that depends on this process's clock the same in all ranks."""
        self._plan = plan
        self._agree = agree
        self._lanes: dict[LaneName, Lane] = {
            name: Lane() for name in ("later", "lists", "gathered", "yielding")
        }
        self._single: dict[int, Member] = {}  # by identity
        self._gathering = Gathering(gather_seconds)
        self._gathering_later = Gathering(gather_seconds)

    def lane(self, name: LaneName) -> Lane:
        """Of any name but "single"."""
        return self._lanes[name]

    def single(self) -> Iterable[Member]:
        """Requests to be scheduled by themselves, in order of arrival."""
        return self._single.values()

    def waits_in(self, name: LaneName) -> bool:
        return bool(self._single) if name == "single" else bool(self.lane(name))

    @property
    def gathering(self) -> bool:
        """Whether a plan is still to be made."""
        return bool(self._gathering) or bool(self._gathering_later)

    @property
    def waits(self) -> bool:
        return self.gathering or bool(self._single) or any(self._lanes.values())

    def batches_waiting(self) -> list[Batch]:
        """Batches of which requests wait."""
        return [batch for lane in self._lanes.values() for batch in lane.batches()]

    @staticmethod
    def lane_of(member: Member) -> LaneName:
        batch = member.batch
        if batch is None:
            return "single"
        if batch.whole:
            return "yielding" if batch.yields else "lists"
        return "later" if batch.later else "gathered"

    def arrive(self, member: Member, shareable: bool) -> None:
        """A request is to be scheduled: new, or back after a retraction.

        shareable: whether equal token ids mean equal KV for it.
        """
        batch = member.batch
        if batch is not None:
            batch.enqueue(member)
            self.lane(self.lane_of(member)).add(batch)
        elif not shareable:
            self._single[id(member)] = member
        elif member.turn is not None and member.turn.kind == "later":
            self._gathering_later.add(member)
        else:
            self._gathering.add(member)

    def depart(self, member: Member) -> None:
        """An unplanned request does not wait any more."""
        self._single.pop(id(member), None)
        self._gathering.discard(member)
        self._gathering_later.discard(member)

    def close_gatherings(self) -> None:
        """Plan what has gathered, if it is time."""
        if self._gathering_later and self._agree(self._gathering_later.due):
            self._plan_together(self._gathering_later.close())
        if self._gathering and not self.lane("gathered") and self._agree(self._gathering.due):
            members = self._gathering.close()
            if len(members) > 1:
                self._plan_together(members)
            else:
                self.arrive(members[0], shareable=False)

    def _plan_together(self, members: list[Member]) -> None:
        self._plan(members, False)
        for member in members:
            self.arrive(member, shareable=True)
