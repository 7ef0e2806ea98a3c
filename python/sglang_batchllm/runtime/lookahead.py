"""A planned batch's part in the memory forecast of one scheduling step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sglang_batchllm.runtime.forecast import MemoryForecast
from sglang_batchllm.runtime.outputs import MAX_EXPECTED_OUTPUT, expected_steps, most_output
from sglang_batchllm.runtime.pins import ROOT, Member

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_batchllm.runtime.batch import PlannedBatch


class Lookahead:
    """Counts a batch's running requests, and then asks for room for waiting ones in plan order.

    A shared prefix is charged once. It is let go with the last request that passes it, so it
    counts as freed then as soon as none of those waits outside the forecast any more.
    """

    def __init__(self, batch: PlannedBatch, forecast: MemoryForecast):
        self._batch = batch
        self._forecast = forecast
        self._last_use: dict[int, float] = {}  # shared node: steps until its last known use
        running = batch.running
        index = np.fromiter(running, np.int64, len(running))
        decoded = np.fromiter(
            (len(req.output_ids) for req in running.values()), np.int64, len(running)
        )
        groups = batch.plan.group_of[index]
        self._decoded = np.bincount(groups + 1, decoded)  # of no group first
        self._all_decoded = int(decoded.sum())
        self._shown: dict[int, float] = {}  # group: steps that its finished requests let expect
        present, place = np.unique(groups, return_inverse=True)
        shown = np.array([self._shown_by(group) for group in present.tolist()])[place]
        most = np.clip(batch.max_output[index] - decoded, 0, MAX_EXPECTED_OUTPUT)
        self._running = (batch.hints[index], decoded, most)
        steps = expected_steps(*self._running, shown)
        own = batch.own_tokens[index] + decoded
        forecast.add_all(steps, np.where(batch.continued[index], -steps, own))
        homes, place = np.unique(batch.home[index], return_inverse=True)
        last = np.zeros(len(homes))
        np.maximum.at(last, place, steps)
        for node, until in zip(homes.tolist(), last.tolist(), strict=True):
            self._use(node, until)
        for node in list(self._last_use):
            if not batch.has_waiting(node):
                self._let_go(node)

    def _shown_by(self, group: int) -> float:
        """Decode steps to come of a request of the group, by what others of it have shown."""
        steps = self._shown.get(group)
        if steps is None:
            decoded = self._decoded[group + 1] if group + 1 < len(self._decoded) else 0
            steps = self._batch.group_lengths[group].remaining(decoded)
            if steps is None:
                steps = self._batch.lengths.remaining(self._all_decoded)
            self._shown[group] = steps = math.inf if steps is None else float(steps)
        return steps

    def _expected_steps(self, req: Req, member: Member) -> float:
        hint = self._batch.hints[member.index]
        shown = self._shown_by(self._batch.group_of(member))
        return float(expected_steps(hint, len(req.output_ids), most_output(req), shown))

    def steps_by_whole_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Decode steps expected of each running and of each waiting request, float64[n] each, if
        what the whole batch has shown holds for every group."""
        batch = self._batch
        shown = batch.lengths.remaining(self._all_decoded)
        shown = math.inf if shown is None else shown
        index = batch.waiting_index()
        most = np.minimum(batch.max_output[index], MAX_EXPECTED_OUTPUT)
        waiting = expected_steps(batch.hints[index], 0, most, shown)
        return expected_steps(*self._running, shown), waiting

    def admit(self, req: Req, member: Member, opened: int, next_position: int) -> bool:
        """Whether there is room for a waiting request.

        opened: tokens of new shared prefixes that it computes. next_position: where in the plan
        the next waiting request stands.
        """
        pins = self._batch.pins
        steps = self._expected_steps(req, member)
        own = self._batch.tokens_past(req, member.home)
        held = pins.held_elsewhere(member, opened)
        own -= max(held - opened, 0)
        prefix = max(opened - held, 0)
        own += self._batch.page_slack
        kept = self._batch.continued[member.index]
        if not self._forecast.admit(own, steps, prefix=prefix, kept=kept):
            return False
        self._use(member.home, steps)
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
        self._use(member.home, steps)
        self._pass(member, positions.stop)
        return True

    def _use(self, node: int, steps: float) -> None:
        parent = self._batch.pins.parent
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
