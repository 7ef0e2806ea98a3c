"""What the memory forecast of one scheduling step knows of planned batches."""

from __future__ import annotations

import numpy as np

from sglang_batchllm.policy.admission.forecast import MemoryForecast
from sglang_batchllm.policy.admission.outputs import (
    EXTRA_STEPS,
    MAX_EXPECTED_OUTPUT,
    OutputLengths,
    expected_steps,
    expected_steps_of_one,
    most_output,
)
from sglang_batchllm.policy.admission.running import Running
from sglang_batchllm.policy.admission.state_slots import StateSlots
from sglang_batchllm.policy.admission.window_forecast import WindowForecast
from sglang_batchllm.policy.batch import Batch, Member
from sglang_batchllm.policy.pins import ROOT


class Lookahead:
    """Counts the running requests, and then asks for room for waiting ones in plan order.

    A shared prefix is charged once. It is let go with the last request that passes it, so it
    counts as freed then as soon as none of those waits outside the forecast any more.
    """

    def __init__(
        self,
        running: Running,
        lengths: OutputLengths,
        forecast: MemoryForecast,
        waiting: list[Batch],
        single_row: int,
        windows: WindowForecast | StateSlots | None = None,
    ):
        """waiting: batches of which requests wait. single_row: of `lengths`, for requests that are
        scheduled by themselves. windows: of the pool of layers with a window or a state, if there
        is one."""
        self._forecast = forecast
        self.windows = windows
        self._single_row = single_row
        self._running = running
        self._last_use: dict[int, float] = {}  # shared node: steps until its last known use
        self._decoded = running.decoded()
        self._remaining = lengths.remaining(running.row, self._decoded)
        self._most = np.clip(running.max_output - self._decoded, 0, MAX_EXPECTED_OUTPUT)
        shown = self._remaining.of_each(running.row)
        steps = expected_steps(running.hint, self._decoded, self._most, shown)
        forecast.add_all(steps, np.where(running.kept, -steps, running.own + self._decoded))
        if windows is not None:  # what outlives a request can be evicted there
            windows.add_running(running.own + self._decoded, steps)
        self._count_prefixes(steps, waiting)

    def _count_prefixes(self, steps: np.ndarray, waiting: list[Batch]) -> None:
        """The shared prefixes of running requests are let go with their last use."""
        running = self._running
        homes, first, place = np.unique(running.home, return_index=True, return_inverse=True)
        last = np.zeros(len(homes))
        np.maximum.at(last, place, steps)
        shared = homes >= 0
        settled = ~np.isin(running.batch[first], [batch.number for batch in waiting])
        alone = shared & settled & running.at_root[first]
        self._forecast.add_all(last[alone], running.home_depth[first][alone], count=0)
        if self.windows is not None:
            self.windows.let_go(last[alone], running.home_depth[first][alone])
        batches: dict[int, Batch] = {}
        for entry in np.flatnonzero(shared & ~alone).tolist():
            member = running.members[int(first[entry])]
            assert member.batch is not None
            batches[member.batch.number] = member.batch
            self._use(member.batch, member.home, float(last[entry]))
        for name in list(self._last_use):
            batch, node = batches[name >> 32], name & 0xFFFFFFFF
            if not batch.has_waiting(node):
                self._let_go(batch, node)

    def _expected_steps(self, member: Member, batch: Batch) -> float:
        hint = float(batch.hints[member.index])
        shown = self._remaining.of(int(batch.length_rows[member.index]))
        request = member.request
        return expected_steps_of_one(hint, len(request.output_ids), most_output(request), shown)

    def steps_by_whole_batch(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Decode steps expected of each of the batch's running and of its waiting requests,
        float64[n] each, if what the whole batch has shown holds for every group."""
        shown = self.shown(batch)
        mine = self._running.batch == batch.number
        hints = self._running.hint[mine]
        running = expected_steps(hints, self._decoded[mine], self._most[mine], shown)
        return running, batch.steps_of_waiting(shown)

    @property
    def none_run(self) -> bool:
        return not len(self._running)

    def shown(self, batch: Batch) -> float:
        """Tokens still to come of any of the batch's requests, by what others show."""
        return self._remaining.of(batch.length_row)

    def admit_alone(self, member: Member) -> bool:
        """Whether there is room for a request that shares nothing by plan."""
        shown = self._remaining.of(self._single_row)
        steps = min(shown, most_output(member.request)) + EXTRA_STEPS
        if not self._forecast.admit(member.tokens, steps):
            return False
        return self._heed(self.windows is None or self.windows.admit(member.tokens, steps))

    def _heed(self, fits: bool) -> bool:
        self._forecast.refused |= not fits
        return fits

    def admit(self, member: Member, opened: int, next_position: int) -> bool:
        """Whether there is room for a waiting request.

        opened: tokens of new shared prefixes that it computes. next_position: where in the plan
        the next waiting request stands.
        """
        batch = member.batch
        assert batch is not None
        own = whole_own = batch.own_tokens_to_compute(member)
        held = 0
        if not batch.private:  # its prompts may be somebody else's too
            held = batch.pins.held_elsewhere(member, opened)
        own -= max(held - opened, 0)
        prefix = max(opened - held, 0)
        own += batch.page_slack
        steps = self._expected_steps(member, batch)
        kept = bool(batch.continued[member.index])
        if not self._forecast.admit(own, steps, prefix=prefix, kept=kept):
            return False
        if self.windows is not None:
            in_windows = batch.pins.window_tokens_of_cold(member)
            if not self._heed(self.windows.admit(whole_own + batch.page_slack, steps, in_windows)):
                return False
        self._use(batch, member.home, steps)
        self._pass(batch, member.home, next_position)
        return True

    def set_aside(self, member: Member, positions: range, waiting: int) -> bool:
        """Whether there is room for all requests that wait for one prefix to be computed.

        They follow in the next steps, and whoever is admitted after them must leave them room.
        member: the first of them. positions: where they stand in the plan, `waiting` of them
        still waiting.
        """
        batch = member.batch
        assert batch is not None
        tokens = batch.tokens_to_compute(positions) * waiting // len(positions)
        tokens += waiting * batch.page_slack
        steps = self._expected_steps(member, batch)
        kept = bool(batch.continued[member.index])
        if not self._forecast.admit(tokens, steps, count=waiting, kept=kept):
            return False
        if not self._heed(self.windows is None or self.windows.set_aside(tokens, steps, waiting)):
            return False
        self._use(batch, member.home, steps)
        self._pass(batch, member.home, positions.stop)
        return True

    def _use(self, batch: Batch, node: int, steps: float) -> None:
        parent = batch.pins.parent
        while node != ROOT and self._last_use.get(batch.node_id(node), -1.0) < steps:
            self._last_use[batch.node_id(node)] = steps
            node = parent[node]

    def _pass(self, batch: Batch, node: int, next_position: int) -> None:
        """All that waits at or below the node before `next_position` is in the forecast."""
        while node != ROOT and batch.subtree_end[node] <= next_position:
            self._let_go(batch, node)
            node = batch.pins.parent[node]

    def _let_go(self, batch: Batch, node: int) -> None:
        depth = batch.pins.depth
        until = self._last_use.pop(batch.node_id(node))
        tokens = depth[node] - depth[batch.pins.parent[node]]
        self._forecast.add(until, tokens, count=0)
        if self.windows is not None:
            self.windows.let_go(np.array([until]), np.array([tokens]))
