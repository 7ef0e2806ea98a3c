"""A planned batch at run time: its plan, its requests, and which of them wait."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_batchllm.planning import BatchPlan, plan_batch
from sglang_batchllm.runtime.pins import ROOT, Member, PinnedTree, PrefixStore
from sglang_batchllm.runtime.report import BatchReport

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_ATTRIBUTE = "batchllm"
_GROUP_IDS = itertools.count(1)

MAX_EXPECTED_OUTPUT = 4096
"""Cap on the output that is set aside for a request, in tokens; SGLang's own admission caps its
estimate at the same number by default."""


@dataclass(slots=True)
class Planned:
    """What a request of SGLang's carries while it belongs to a batch."""

    batch: PlannedBatch
    member: Member


def batch_of(req: Req) -> Planned | None:
    """The batch and place of a request, or None for one that is not planned."""
    return getattr(req, _ATTRIBUTE, None)


class PlannedBatch:
    """The requests of one plan and the state of their shared prefixes.

    private: the batch was handed over whole, so its prefixes are of no use to requests outside
        it and leave the cache with it. Otherwise they were gathered as they came, more of their
        kind may follow, and they are cached as SGLang does.
    largest_need: tokens of the largest request, prompt and expected output.
    """

    def __init__(
        self,
        requests: Sequence[Req],
        store: PrefixStore,
        page_size: int,
        report: BatchReport,
        private: bool,
    ):
        outputs = [  # SGLang fills in max_new_tokens on arrival
            min(req.sampling_params.max_new_tokens or 0, MAX_EXPECTED_OUTPUT) for req in requests
        ]
        self.plan: BatchPlan = plan_batch(
            [r.origin_input_ids for r in requests],
            page_size,
            outputs,
            namespaces=[r.extra_key for r in requests],
        )
        self.pins = PinnedTree(self.plan, store, free_on_release=private)
        self.private = private
        self.report = report
        report.add_plan(self.plan)
        self._group_of: list[int] = self.plan.group_of.tolist()
        self._group_prefix_lens: list[int] = self.plan.groups.prefix_len.tolist()
        self._group_ids: dict[tuple[int, int], int] = {}
        self.unfinished = len(requests)
        self.largest_need = int((self.plan.prompt_lens + outputs).max()) + page_size

        self._requests = list(requests)
        self._members = [
            Member(index, self.pins.home[index], req.origin_input_ids, req.extra_key)
            for index, req in enumerate(requests)
        ]
        for req, member in zip(requests, self._members, strict=True):
            setattr(req, _ATTRIBUTE, Planned(self, member))
        self._order: list[int] = self.plan.order.tolist()
        self._position = [0] * len(requests)
        for position, index in enumerate(self._order):
            self._position[index] = position
        self._subtree_end = self._subtree_ends()
        self._waiting: list[int] = []  # positions in the order, ascending

    def enqueue(self, member: Member) -> None:
        """The member waits to be scheduled: at first, or again after a retraction."""
        insort(self._waiting, self._position[member.index])

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting(self) -> list[Req]:
        """The waiting requests in the plan's order."""
        return [self._requests[self._order[position]] for position in self._waiting]

    def select(
        self, max_tokens: int, max_requests: int, may_open: Callable[[int, bool], bool]
    ) -> list[Req]:
        """Claim the next requests to prefill, in the plan's order; `settle` must follow.

        A request is passed over for as long as another computes a prefix that it shares.
        max_tokens: prompt tokens after which no further request is taken.
        may_open: told the tokens of new shared prefixes that a request would pin, and whether
            it is the batch's first waiting request; selection ends where it says no.
        """
        chosen: list[Req] = []
        at = 0
        while at < len(self._waiting) and max_tokens > 0 and len(chosen) < max_requests:
            index = self._order[self._waiting[at]]
            member, req = self._members[index], self._requests[index]
            blocker, opened = self.pins.path_state(member)
            if blocker != ROOT:
                at = bisect_left(self._waiting, self._subtree_end[blocker], at + 1)
                continue
            if opened and not may_open(opened, at == 0):
                break
            self.pins.claim(member)
            cached = self.pins.depth[member.home] - opened
            max_tokens -= len(req.origin_input_ids) + len(req.output_ids) - cached
            chosen.append(req)
            at += 1
        return chosen

    def settle(self, req: Req, member: Member, scheduled: bool) -> None:
        """Close a `select`: the request was scheduled for prefill, or was not after all."""
        if not scheduled:
            self.pins.unclaim(member)
            return
        position = self._position[member.index]
        del self._waiting[bisect_left(self._waiting, position)]

    def published(self, member: Member, computed: int) -> None:
        """Prompt tokens [0, computed) of a leader are in the cache now."""
        self.pins.settle(member, computed)
        self.report.note_pinned(self.pins.pinned_tokens)

    def attention_group(self, member: Member, shared: int) -> tuple[int, int]:
        """An id for the member's group among all running ones, and the group's prefix tokens;
        (0, 0) for none.

        shared: leading prompt tokens whose KV slots the member has in common with the cache. It
        can be less than the group's prefix, as for a request that computed its prompt's last
        token itself although others share it.
        """
        group = self._group_of[member.index]
        if group < 0 or shared < self._group_prefix_lens[group]:
            return 0, 0
        # A prefix that was given up and computed again has new slots, so its group is another.
        key = (group, self.pins.times_relaxed)
        if key not in self._group_ids:
            self._group_ids[key] = next(_GROUP_IDS)
        return self._group_ids[key], self._group_prefix_lens[group]

    def leave(self, member: Member, req: Req) -> None:
        """The request gave its KV back: for good if it is finished, else it was retracted."""
        if req.finished():
            self.finish(member, req)
        else:
            self.pins.unclaim(member)
            self.report.retractions += 1

    def finish(self, member: Member, req: Req) -> None:
        """The request is over, whether or not it ever ran."""
        if member.finished:
            return
        position = self._position[member.index]
        at = bisect_left(self._waiting, position)
        if at < len(self._waiting) and self._waiting[at] == position:
            del self._waiting[at]
        self.pins.finish(member)
        self.unfinished -= 1
        delattr(req, _ATTRIBUTE)
        self._requests[member.index] = None  # type: ignore[call-overload]
        self.report.add_finished(req)

    def _subtree_ends(self) -> list[int]:
        """For each tree node, the position in the order just after its last request."""
        tree = self.plan.tree
        ends = [0] * tree.num_nodes
        for index, node in enumerate(tree.request_node.tolist()):
            ends[node] = max(ends[node], self._position[index] + 1)
        for node in range(tree.num_nodes - 1, 0, -1):
            up = self.pins.parent[node]
            ends[up] = max(ends[up], ends[node])
        return ends
