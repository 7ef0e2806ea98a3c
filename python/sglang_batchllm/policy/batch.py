"""Requests and what is noted about them; those that were planned together, their plan, and which of
them wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sglang_batchllm.planning import BatchPlan, plan_batch
from sglang_batchllm.policy.admission.outputs import (
    MAX_EXPECTED_OUTPUT,
    OutputLengths,
    expected_steps,
    hinted_output,
    most_output,
)
from sglang_batchllm.policy.admission.short import is_short
from sglang_batchllm.policy.paths import SharedPaths
from sglang_batchllm.policy.pins import ROOT, PinnedTree
from sglang_batchllm.policy.requests import Request, Turn
from sglang_batchllm.policy.rows import Ask, Lead, RowMemory
from sglang_batchllm.policy.scoring import Scoring
from sglang_batchllm.policy.step import WindowPool
from sglang_batchllm.policy.waiting import Waiting
from sglang_batchllm.policy.windowed import LEAST_SAVED, WindowedTree

if TYPE_CHECKING:
    from sglang_batchllm.policy.store import Store

LONG = 4
"""A request for which room is kept is taken to decode up to so many times what others show: one of
a geometric length decodes more in 2% of cases."""

_NUMBERS = itertools.count(1)


@dataclass(slots=True, eq=False)
class Member:
    """What is noted about a request from its arrival to its end.

    turn: its part in a program, if any. batch: what it was planned with, None for one that is
    scheduled by itself. index: its place in the batch's plan. home: its deepest shared node.
    claimed: shared nodes that it is scheduled to compute and has not yet, top down. matched: prompt
    tokens found in the cache when it was last scheduled. slot: its entry in `Running`, -1 unless it
    holds KV. ask: the logprobs of its prompt that it has yet to be given. lead: those that it
    leaves to others.
    """

    request: Request
    turn: Turn | None = None
    batch: Batch | None = None
    index: int = -1
    home: int = 0
    claimed: list[int] = field(default_factory=list)
    matched: int = 0
    slot: int = -1
    ask: Ask | None = None
    lead: Lead | None = None

    @property
    def tokens(self) -> int:
        """Of the prompt and what has been decoded."""
        return len(self.request.origin_input_ids) + len(self.request.output_ids)


LONG_LIST = 256
"""Requests of a list that nobody takes one by one to go on with them."""

LITTLE = 64
"""Most prompt tokens of its own with which a request of a short answer is not kept. A large GPU
computes them in 1.5 ms; to keep them takes a tenth of a millisecond of the host."""

_ATTRIBUTE = "batchllm"


def member_of(request: Request) -> Member | None:
    """What is noted about a request that has arrived and not ended."""
    return getattr(request, _ATTRIBUTE, None)


def note(request: Request, turn: Turn | None = None, ask: Ask | None = None) -> Member:
    """Begin to note things about a request."""
    member = Member(request, turn, ask=ask)
    setattr(request, _ATTRIBUTE, member)
    return member


def forget(request: Request) -> None:
    """The request has ended."""
    delattr(request, _ATTRIBUTE)


class Room(Protocol):
    """Whether the KV pool has room for waiting requests; see `admission.lookahead.Lookahead`."""

    def admit(self, member: Member, opened: int, next_position: int) -> bool: ...

    def set_aside(self, member: Member, positions: range, waiting: int) -> bool: ...


class Batch:
    """The requests of one plan and the state of their shared prefixes.

    number: increases from batch to batch.
    name: the list's, if it was handed over with programs.
    whole: handed over in one call, so that nobody waits for one of the requests alone.
    later: they are later turns of programs.
    yields: all others go first.
    continued: for each request whether its text stays in memory for a later turn, see
        `texts.HeldTexts`.
    private: handed over whole, and nothing continues its texts: nobody else needs its KV.
    members: in the order of the plan's indices; None once a request has ended.
    order, position: the plan's, and each index's place in it.
    opening: parts of the list are missing, and who shares what with them nobody knows; see `parts`.
    waiting: by place in the order.
    num_running, unfinished: requests that hold KV, and that have not ended.
    outputs_differ: some requests are expected to decode longer than others, so that they may start
        a few at a time (`admission.level`).
    hints: each request's expected output by its caller, in tokens, or NaN. max_output: tokens that
        each may decode. home: its deepest shared node, or ROOT. own_tokens: its prompt tokens below
        that.
    length_rows: of `OutputLengths`, the whole batch's and each index's.
    subtree_end: for each tree node, the place in the order just after its last request.
    page_slack: tokens that a request may hold beyond its own, by whole pages.
    """

    def __init__(
        self,
        members: Sequence[Member],
        store: Store,
        page_size: int,
        whole: bool,
        lengths: OutputLengths,
        parent_row: int,
        count_pinned: Callable[[int, int], None],
        row_memory: RowMemory,
        windows: WindowPool | None = None,
    ):
        """parent_row: of `lengths`, for what is larger than the batch; -1 for nothing.
        count_pinned: told how many tokens more are pinned, or fewer. row_memory: where logprobs of
        shared tokens are kept. windows: see `Limits`."""
        self.number = next(_NUMBERS)
        turns = [member.turn for member in members]
        self.name = next((turn.batch for turn in turns if turn), "")
        self.whole = whole
        self.later = any(turn and turn.kind == "later" for turn in turns)
        self.yields = all(turn and turn.yields for turn in turns)
        self.continued = np.array([bool(turn and turn.kind != "once") for turn in turns])
        self.private = whole and not self.continued.any()
        requests = [member.request for member in members]
        self.hints = np.array([hinted_output(request.rid) for request in requests])
        self.max_output = np.array([r.sampling_params.max_new_tokens or 0 for r in requests])
        most = np.array([most_output(request) for request in requests])
        outputs = np.fmin(self.hints, most).astype(np.int64)
        self.plan: BatchPlan = plan_batch(
            [request.origin_input_ids for request in requests],
            page_size,
            outputs,
            namespaces=[request.extra_key for request in requests],
        )
        asked = any(member.ask for member in members)
        if windows is None:
            self.pins = PinnedTree(self.plan, store, count_pinned)
        else:  # who asks for logprobs is given those of all nodes
            nodes = int((self.plan.tree.num_requests[1:] > 1).sum())
            scarce = windows.recurrent and len(members) + nodes > windows.capacity
            least_saved = LEAST_SAVED if scarce and not asked else 0
            self.pins = WindowedTree(self.plan, store, count_pinned, windows, least_saved)
        self.outputs_differ = bool(outputs.min() < outputs.max())
        self.page_slack = page_size - 1
        self._largest_prompt = int(self.plan.prompt_lens.max()) + page_size
        hinted = ~np.isnan(self.hints)
        self._largest_hinted = int(outputs[hinted].max()) if hinted.any() else 0
        self._largest_output = int(outputs.max())

        self.members: list[Member | None] = list(members)
        for index, member in enumerate(members):
            member.batch, member.index, member.home = self, index, self.pins.home[index]
        self.home = np.array(self.pins.home)
        self.own_tokens = self.plan.prompt_lens - np.array(self.pins.depth)[self.home]
        self.order: list[int] = self.plan.order.tolist()
        self.position = np.empty(len(members), np.int64)
        self.position[self.plan.order] = np.arange(len(members))
        self.waiting = Waiting(len(members))
        self.opening = False
        self.num_running = 0
        self.unfinished = len(members)
        self._subtree_start, self.subtree_end = self._subtrees()
        self.scoring: Scoring | None = None
        if asked:
            self.scoring = self.pins.scoring = Scoring(self, self.pins, row_memory)
        self._to_compute = np.concatenate(
            [[0], np.cumsum(self.plan.to_compute[self.plan.order], dtype=np.int64)]
        )

        group_of = self.plan.group_of
        self.paths = SharedPaths(self.plan, self.pins)
        (own_row,) = lengths.take(parent_row)
        group_rows = lengths.take(int(own_row), len(self.plan.groups.size))
        self._taken_rows = np.append(group_rows, own_row)
        # The requests of no group tell of each other by the batch's own row (index -1).
        self.length_row, self.length_rows = int(own_row), self._taken_rows[group_of]

    def take_over(self, members: Iterable[Member]) -> None:
        """These have run, or run, by a plan that this one follows: what they have computed is
        ready."""
        going_on = []
        for member in members:
            member.claimed = []
            self.pins.claim(member)
            self.pins.adopt(member)
            if member.claimed:
                self.pins.unclaim(member)
                going_on.append(member)
        for member in going_on:
            if member.slot >= 0 and self.pins.path_state(member)[0] == ROOT:
                self.pins.claim(member)  # its prompt is prefilled in chunks

    def dissolve(self, lengths: OutputLengths) -> None:
        """Another plan has taken over all requests."""
        self.waiting = Waiting(0)
        self.pins.relax(None)
        self.give_back_rows(lengths)

    def give_back_rows(self, lengths: OutputLengths) -> None:
        lengths.give_back(self._taken_rows)

    def keeps(self, request: Request, pressed: bool) -> bool:
        """Whether KV that a request of it leaves is to stay in the cache. pressed: memory keeps
        somebody out.

        Of a list that was handed over whole, and is complete, nobody is known to need it, so it
        stays only while memory keeps nobody out. Of a long list, only where it was asked for more
        than a label or a score, or than a short answer to little: keeping takes longer than all
        else about such a request. (Programs go on with one of the choices that a short list has
        scored.)
        """
        if not self.private or self.opening:
            return True
        if pressed or len(self.members) < LONG_LIST:
            return not pressed
        most = request.sampling_params.max_new_tokens or 0
        member = member_of(request)
        assert member is not None
        little = self.own_tokens[member.index] <= LITTLE
        return not (most <= 1 or (is_short(most) and little))

    def tokens_waiting(self) -> int:
        """Prompt tokens that those who wait share with nobody."""
        return int(self.own_tokens[self.plan.order[self.waiting.places()]].sum())

    def stop_continuing(self) -> None:
        """Nothing continues its texts from now on."""
        self.continued[:] = False
        self.private = self.whole

    def node_id(self, node: int) -> int:
        """A name of the node that no other batch's node has."""
        return (self.number << 32) + node

    def enqueue(self, member: Member) -> None:
        """The member waits to be scheduled: at first, or again after a retraction."""
        self.waiting.add(int(self.position[member.index]))

    def largest_need(self, shown: float) -> float:
        """Tokens of the largest request, prompt and output. shown: what the others let expect of
        an output."""
        output = max(self._largest_hinted, LONG * shown)
        return self._largest_prompt + min(self._largest_output, output)

    def select(
        self,
        max_tokens: int,
        max_requests: int,
        room: Room,
        may_open: Callable[[int, int, bool], bool],
    ) -> list[Member]:
        """Claim the next requests to prefill, in the plan's order; each must be either started or
        given up (`unclaim`) after that.

        A request is passed over for as long as another computes a prefix that it shares.
        max_tokens: prompt tokens after which no further request is taken. The last one may be cut
            by it, except to fill the last eighth of a step where requests start a few at a time
            (what is left of it would take a step of its own), or decode before the next one
            (`admission.short`: nothing can while a prompt is in chunks).
        room: whether a request finds it; selection ends where it does not.
        may_open: told the tokens of new shared prefixes that a request would pin, those in the
            window pool, and whether it is the batch's first waiting request; selection ends where
            it says no.
        """
        chosen: list[Member] = []
        nearly_full = (
            max_tokens // 8 if self.outputs_differ or is_short(self._largest_output) else 0
        )
        first = place = self.waiting.first()
        while place >= 0 and max_tokens > 0 and len(chosen) < max_requests:
            member = self.members[self.order[place]]
            assert member is not None
            blocker, opened = self.pins.path_state(member)
            if blocker != ROOT:
                behind = range(place, self.subtree_end[blocker])
                waiting = self.waiting.count_in(place, behind.stop)
                if not room.set_aside(member, behind, waiting):
                    break
                place = self.waiting.first(behind.stop)
                continue
            tokens = self.own_tokens_to_compute(member) + opened
            if max_tokens < tokens and max_tokens <= nearly_full:
                break
            in_windows = self.pins.window_tokens_of_cold(member)
            if opened and not may_open(opened, in_windows, place == first):
                break
            following = self.waiting.first(place + 1)
            if not room.admit(member, opened, following if following >= 0 else len(self.order)):
                break
            self.pins.claim(member)
            self.pins.adopt(member)
            max_tokens -= self.tokens_to_prefill(member) if member.claimed else tokens
            chosen.append(member)
            place = following
        return chosen

    def tokens_to_prefill(self, member: Member) -> int:
        """Tokens of a selected request that its first pass computes, unless others fill that."""
        end = self.pins.pass_ends_at(member)
        if end is not None:
            return end - self.pins.depth[self.pins.parent[member.claimed[0]]]
        node = self.pins.parent[member.claimed[0]] if member.claimed else member.home
        return self.tokens_past(member, node) + self.computed_again(member)

    def own_tokens_to_compute(self, member: Member) -> int:
        """Those after all that it shares, and those that it computes again for their logprobs."""
        return self.tokens_past(member, member.home) + self.computed_again(member)

    def computed_again(self, member: Member) -> int:
        """See `Scoring.computed_again`."""
        return 0 if self.scoring is None else self.scoring.computed_again(member)

    def prefix_limit(self, member: Member) -> int | None:
        """See `Scoring.limit` and `PinnedTree.computes_from`."""
        limits = [self.pins.computes_from(member)]
        if self.scoring is not None:
            limits.append(self.scoring.limit(member))
        return min((limit for limit in limits if limit is not None), default=None)

    def tokens_past(self, member: Member, node: int) -> int:
        """Tokens of a request, prompt and output, after those of a tree node on its path."""
        return member.tokens - self.pins.depth[node]

    def start(self, member: Member) -> None:
        """The request was scheduled for prefill."""
        self.waiting.discard(int(self.position[member.index]))
        self.num_running += 1

    def places(self, node: int) -> range:
        """Where the requests at or below a tree node stand in the order."""
        return range(self._subtree_start[node], self.subtree_end[node])

    def first_unfinished(self, places: range) -> Member | None:
        members = (self.members[self.order[place]] for place in places)
        return next((member for member in members if member is not None), None)

    def has_waiting(self, node: int) -> bool:
        """Whether a request at or below the tree node waits."""
        return self.waiting.first(self._subtree_start[node], self.subtree_end[node]) >= 0

    def tokens_to_compute(self, positions: range) -> int:
        """Distinct prompt tokens that the requests at these places of the order add."""
        return int(self._to_compute[positions.stop] - self._to_compute[positions.start])

    def steps_of_waiting(self, shown: float) -> np.ndarray:
        """Decode steps expected of each waiting request, float64[n]. shown: by what others show."""
        index = self.plan.order[self.waiting.places()]
        most = np.minimum(self.max_output[index], MAX_EXPECTED_OUTPUT)
        return expected_steps(self.hints[index], 0, most, shown)

    def stop(self, member: Member, was_running: bool) -> None:
        """The request gave its KV back, and has not ended: it was retracted."""
        self.pins.unclaim(member)
        self.num_running -= was_running

    def end(self, member: Member, was_running: bool, free: bool) -> None:
        """The request is over, whether or not it ever ran. free: see `PinnedTree.finish`."""
        self.waiting.discard(int(self.position[member.index]))
        self.num_running -= was_running
        self.pins.finish(member, free, last_use=self.whole and not self.opening)
        self.unfinished -= 1
        self.members[member.index] = None

    def _subtrees(self) -> tuple[list[int], list[int]]:
        """For each tree node, the places in the order of its first request and just after its
        last."""
        tree = self.plan.tree
        starts = np.full(tree.num_nodes, len(self.order), np.int64)
        ends = np.zeros(tree.num_nodes, np.int64)
        np.minimum.at(starts, tree.request_node, self.position)
        np.maximum.at(ends, tree.request_node, self.position + 1)
        first, last = starts.tolist(), ends.tolist()
        for node in range(tree.num_nodes - 1, 0, -1):
            up = self.pins.parent[node]
            first[up] = min(first[up], first[node])
            last[up] = max(last[up], last[node])
        return first, last


def tokens_to_prefill(member: Member) -> int:
    """Of a chosen request; see `Batch.tokens_to_prefill`. For one without a plan, at most."""
    return member.tokens if member.batch is None else member.batch.tokens_to_prefill(member)
