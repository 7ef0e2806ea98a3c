"""A planned batch at run time: its plan, its requests, and which of them wait."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sglang_batchllm.planning import BatchPlan, plan_batch
from sglang_batchllm.request_ids import parse_request_id
from sglang_batchllm.runtime.outputs import OutputLengths, hinted_output, most_output
from sglang_batchllm.runtime.pins import ROOT, Member, PinnedTree, PrefixStore
from sglang_batchllm.runtime.report import BatchReport

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_batchllm.runtime.lookahead import Lookahead

_ATTRIBUTE = "batchllm"
_GROUP_IDS = itertools.count(1)


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

    id: the list's name, if `run_batch` handed it over.
    running: the requests that hold KV, by index.
    private: the batch was handed over whole and nothing continues its texts, so its prefixes are
        of no use to requests outside it and leave the cache with it. Otherwise they are cached as
        SGLang does.
    continued: for each request whether its text stays in memory for a later turn, see
        `held.HeldTexts`. urgent: there are later turns in this batch.
    largest_need: tokens of the largest request, prompt and expected output.
    outputs_differ: some requests are expected to decode longer than others, so that they may start
        a few at a time (`level.py`).
    hints: each request's expected output by its caller, in tokens, or NaN.
    max_output: tokens that each may decode. home: its deepest shared node, or ROOT. own_tokens:
        its prompt tokens below that.
    lengths, group_lengths: output lengths of what has finished, in all and by group.
    subtree_end: for each tree node, the position in the order just after its last request.
    page_slack: tokens that a request may hold beyond its own, by whole pages.
    """

    def __init__(
        self,
        requests: Sequence[Req],
        store: PrefixStore,
        page_size: int,
        report: BatchReport,
        whole: bool,
    ):
        """whole: the requests were handed over in one call, not gathered as they came."""
        asked = [parse_request_id(req.rid) for req in requests]
        self.id = next((request.batch for request in asked if request), "")
        turns = [request and request.turn for request in asked]
        self.continued = np.array([turn in ("first", "later") for turn in turns])
        self.urgent = "later" in turns
        self.private = whole and not self.continued.any()
        self.hints = np.array([hinted_output(req.rid) for req in requests])
        self.max_output = np.array([req.sampling_params.max_new_tokens or 0 for req in requests])
        most = np.array([most_output(req) for req in requests])
        outputs = np.fmin(self.hints, most).astype(np.int64)
        self.plan: BatchPlan = plan_batch(
            [r.origin_input_ids for r in requests],
            page_size,
            outputs,
            namespaces=[r.extra_key for r in requests],
        )
        self.pins = PinnedTree(self.plan, store, free_on_release=self.private)
        self.report = report
        report.add_plan(self.plan)
        self._group_of: list[int] = self.plan.group_of.tolist()
        self._group_prefix_lens: list[int] = self.plan.groups.prefix_len.tolist()
        self._group_ids: dict[tuple[int, int], int] = {}
        self.lengths = OutputLengths()
        self.group_lengths: defaultdict[int, OutputLengths] = defaultdict(OutputLengths)
        self.outputs_differ = bool(outputs.min() < outputs.max())
        self.unfinished = len(requests)
        self.page_slack = page_size - 1
        self.largest_need = int((self.plan.prompt_lens + outputs).max()) + page_size

        self._requests = list(requests)
        self._members = [
            Member(index, self.pins.home[index], req.origin_input_ids, req.extra_key)
            for index, req in enumerate(requests)
        ]
        for req, member in zip(requests, self._members, strict=True):
            setattr(req, _ATTRIBUTE, Planned(self, member))
        self.home = np.array(self.pins.home)
        self.own_tokens = self.plan.prompt_lens - np.array(self.pins.depth)[self.home]
        self._order: list[int] = self.plan.order.tolist()
        self._position = [0] * len(requests)
        for position, index in enumerate(self._order):
            self._position[index] = position
        self._subtree_start, self.subtree_end = self._subtrees()
        self._to_compute = np.concatenate(
            [[0], np.cumsum(self.plan.to_compute[self.plan.order], dtype=np.int64)]
        )
        self._waiting: list[int] = []  # positions in the order, ascending
        self.running: dict[int, Req] = {}

    def enqueue(self, member: Member) -> None:
        """The member waits to be scheduled: at first, or again after a retraction."""
        insort(self._waiting, self._position[member.index])

    def _stop_waiting(self, member: Member) -> None:
        position = self._position[member.index]
        at = bisect_left(self._waiting, position)
        if at < len(self._waiting) and self._waiting[at] == position:
            del self._waiting[at]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting_index(self) -> np.ndarray:
        """Indices of the waiting requests in the plan's order, int64[num_waiting]."""
        return self.plan.order[np.array(self._waiting, np.int64)]

    def waiting(self) -> list[Req]:
        """The waiting requests in the plan's order."""
        return [self._requests[self._order[position]] for position in self._waiting]

    def select(
        self,
        max_tokens: int,
        max_requests: int,
        lookahead: Lookahead,
        may_open: Callable[[int, bool], bool],
    ) -> list[Req]:
        """Claim the next requests to prefill, in the plan's order; `settle` must follow.

        A request is passed over for as long as another computes a prefix that it shares.
        max_tokens: prompt tokens after which no further request is taken. The last one may be cut
            by it, except to fill the last eighth of a step where requests start a few at a time:
            what is left of it would take a step of its own.
        lookahead: whether a request finds room; selection ends where it does not.
        may_open: told the tokens of new shared prefixes that a request would pin, and whether
            it is the batch's first waiting request; selection ends where it says no.
        """
        chosen: list[Req] = []
        waiting = self._waiting
        nearly_full = max_tokens // 8 if self.outputs_differ else 0
        at = 0
        while at < len(waiting) and max_tokens > 0 and len(chosen) < max_requests:
            index = self._order[waiting[at]]
            member, req = self._members[index], self._requests[index]
            blocker, opened = self.pins.path_state(member)
            if blocker != ROOT:
                behind = range(waiting[at], self.subtree_end[blocker])
                after = bisect_left(waiting, behind.stop, at + 1)
                if not lookahead.set_aside(req, member, behind, after - at):
                    break
                at = after
                continue
            tokens = self.tokens_past(req, member.home) + opened
            if max_tokens < tokens and max_tokens <= nearly_full:
                break
            if opened and not may_open(opened, at == 0):
                break
            following = waiting[at + 1] if at + 1 < len(waiting) else len(self._order)
            if not lookahead.admit(req, member, opened, following):
                break
            self.pins.claim(member)
            max_tokens -= tokens
            chosen.append(req)
            at += 1
        return chosen

    def tokens_to_prefill(self, req: Req, member: Member) -> int:
        """Tokens of a selected request that have no KV yet."""
        node = self.pins.parent[member.claimed[0]] if member.claimed else member.home
        return self.tokens_past(req, node)

    def tokens_past(self, req: Req, node: int) -> int:
        """Tokens of a request, prompt and output, after those of a tree node on its path."""
        return len(req.origin_input_ids) + len(req.output_ids) - self.pins.depth[node]

    def settle(self, req: Req, member: Member, scheduled: bool) -> None:
        """Close a `select`: the request was scheduled for prefill, or was not after all."""
        if not scheduled:
            self.pins.unclaim(member)
            return
        self._stop_waiting(member)
        self.running[member.index] = req

    def published(self, member: Member, computed: int) -> None:
        """Prompt tokens [0, computed) of a leader are in the cache now."""
        self.pins.settle(member, computed)
        self.report.note_pinned(self.pins.pinned_tokens)

    def group_of(self, member: Member) -> int:
        """The plan's group of the member, -1 for none."""
        return self._group_of[member.index]

    def has_waiting(self, node: int) -> bool:
        """Whether a request at or below the tree node waits."""
        at = bisect_left(self._waiting, self._subtree_start[node])
        return at < len(self._waiting) and self._waiting[at] < self.subtree_end[node]

    def tokens_to_compute(self, positions: range) -> int:
        """Distinct prompt tokens that the requests at these positions of the order add."""
        return int(self._to_compute[positions.stop] - self._to_compute[positions.start])

    def attention_group(self, member: Member, shared: int) -> tuple[int, int]:
        """An id for the member's group among all running ones, and the group's prefix tokens;
        (0, 0) for none.

        shared: leading prompt tokens whose KV slots the member has in common with the cache. It
        can be less than the group's prefix, as for a request that computed its prompt's last
        token itself although others share it.
        """
        group = self.group_of(member)
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
            self.running.pop(member.index, None)
            self.report.retractions += 1

    def finish(self, member: Member, req: Req) -> None:
        """The request is over, whether or not it ever ran."""
        if member.finished:
            return
        self._stop_waiting(member)
        self.running.pop(member.index, None)
        self.pins.finish(member)
        self.unfinished -= 1
        if req.output_ids:
            for lengths in (self.lengths, self.group_lengths[self.group_of(member)]):
                lengths.add(req)
        delattr(req, _ATTRIBUTE)
        self._requests[member.index] = None  # type: ignore[call-overload]
        self.report.add_finished(req)

    def _subtrees(self) -> tuple[list[int], list[int]]:
        """For each tree node, the positions in the order of its first request and just after its
        last."""
        tree = self.plan.tree
        starts = [len(self._order)] * tree.num_nodes
        ends = [0] * tree.num_nodes
        for index, node in enumerate(tree.request_node.tolist()):
            starts[node] = min(starts[node], self._position[index])
            ends[node] = max(ends[node], self._position[index] + 1)
        for node in range(tree.num_nodes - 1, 0, -1):
            up = self.pins.parent[node]
            starts[up] = min(starts[up], starts[node])
            ends[up] = max(ends[up], ends[node])
        return starts, ends
