"""A planned batch's part in the memory forecast of one scheduling step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_batchllm.runtime.forecast import MemoryForecast
from sglang_batchllm.runtime.outputs import most_output
from sglang_batchllm.runtime.pins import ROOT, Member

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_batchllm.runtime.batch import PlannedBatch

EXTRA_STEPS = 1
"""With overlap scheduling a request takes one more slot before it is known to have ended."""


class Lookahead:
    """Counts a batch's running requests, and then asks for room for waiting ones in plan order.

    A shared prefix is charged once. It is let go with the last request that passes it, so it
    counts as freed then as soon as none of those waits outside the forecast any more.
    """

    def __init__(
        self,
        batch: PlannedBatch,
        running: Sequence[tuple[Req, Member]],
        forecast: MemoryForecast,
    ):
        self._batch = batch
        self._forecast = forecast
        self._last_use: dict[int, float] = {}  # shared node: steps until its last known use
        self._decoded = Counter[int]()
        for req, member in running:
            self._decoded[batch.group_of(member)] += len(req.output_ids)
        self._shown: dict[int, float] = {}  # group: what its finished requests let expect
        depth = batch.pins.depth
        for req, member in running:
            steps = self._expected_steps(req, member)
            own = len(req.origin_input_ids) + len(req.output_ids) - depth[member.home]
            forecast.add(steps, -steps if batch.continued[member.index] else own)
            self._use(member, steps)
        for node in list(self._last_use):
            if not batch.has_waiting(node):
                self._let_go(node)

    def _expected_steps(self, req: Req, member: Member) -> float:
        """Decode steps for which the request is expected to hold its KV from now on."""
        batch = self._batch
        most = most_output(req)
        hint = batch.hints[member.index]
        if hint is not None and hint > len(req.output_ids):
            return min(hint - len(req.output_ids), most) + EXTRA_STEPS
        group = batch.group_of(member)
        shown = self._shown.get(group)
        if shown is None:
            shown = batch.group_lengths[group].remaining(self._decoded[group])
            if shown is None:
                shown = batch.lengths.remaining(self._decoded.total())
            self._shown[group] = shown = math.inf if shown is None else shown
        return min(shown, most) + EXTRA_STEPS

    def admit(self, req: Req, member: Member, opened: int, next_position: int) -> bool:
        """Whether there is room for a waiting request.

        opened: tokens of new shared prefixes that it computes. next_position: where in the plan
        the next waiting request stands.
        """
        pins = self._batch.pins
        steps = self._expected_steps(req, member)
        own = len(req.origin_input_ids) + len(req.output_ids) - pins.depth[member.home]
        held = pins.held_elsewhere(member, opened)
        own -= max(held - opened, 0)
        prefix = max(opened - held, 0)
        own += self._batch.page_slack
        kept = self._batch.continued[member.index]
        if not self._forecast.admit(own, steps, prefix=prefix, kept=kept):
            return False
        self._use(member, steps)
        self._pass(member, next_position)
        return True

    def set_aside(self, req: Req, member: Member, positions: range, waiting: int) -> bool:
        """Whether there is room for all requests that wait for one prefix to be computed.

        They follow in the next steps, and whoever is admitted after them must leave them room.
        req, member: the first of them. positions: where they stand in the plan, `waiting` of
        them still waiting.
        """
        batch = self._batch
        tokens = batch.tokens_to_compute(positions) * waiting // len(positions)
        steps = self._expected_steps(req, member)
        tokens += waiting * batch.page_slack
        kept = batch.continued[member.index]
        if not self._forecast.admit(tokens, steps, count=waiting, kept=kept):
            return False
        self._use(member, steps)
        self._pass(member, positions.stop)
        return True

    def _use(self, member: Member, steps: float) -> None:
        parent = self._batch.pins.parent
        node = member.home
        while node != ROOT and self._last_use.get(node, -1.0) < steps:
            self._last_use[node] = steps
            node = parent[node]

    def _pass(self, member: Member, next_position: int) -> None:
        """All that waits before `next_position` is in the forecast."""
        node = member.home
        while node != ROOT and self._batch.subtree_end[node] <= next_position:
            self._let_go(node)
            node = self._batch.pins.parent[node]

    def _let_go(self, node: int) -> None:
        pins = self._batch.pins
        self._forecast.add(
            self._last_use.pop(node), pins.depth[node] - pins.depth[pins.parent[node]], count=0
        )
