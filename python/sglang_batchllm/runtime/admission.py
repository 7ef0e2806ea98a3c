"""Which waiting requests the next prefill step may take: admission by memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_batchllm.runtime.batch import PlannedBatch, batch_of
from sglang_batchllm.runtime.forecast import MemoryForecast
from sglang_batchllm.runtime.intake import Intake
from sglang_batchllm.runtime.level import can_wait
from sglang_batchllm.runtime.lookahead import Lookahead
from sglang_batchllm.runtime.outputs import EXTRA_STEPS, most_output

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Admission:
    """Chooses from an intake what the KV pool can hold until it ends; see `MemoryForecast`.

    Later turns of programs go first, since these hold memory until they end. Lists handed over
    whole and requests that came one by one take turns at following, so neither starves; within
    each, the older goes first.
    """

    def __init__(self, intake: Intake, capacity: int):
        """capacity: tokens of the KV pool."""
        self._intake = intake
        self._capacity = capacity
        self._lists_first = True

    def choose(
        self, running: Sequence[Req], available: int, max_tokens: int, max_requests: int
    ) -> tuple[list[Req], bool]:
        """Claim up to `max_requests` requests with about `max_tokens` tokens to prefill.

        running: requests that hold KV now. available: KV tokens that are free or can be evicted.
        Returns the requests, and whether memory kept others out. `settle` must follow for every
        request returned.
        """
        intake = self._intake
        intake.close_gathering()
        self._lists_first = not self._lists_first
        lists: list[list[Req] | PlannedBatch] = [*intake.batches]
        lone = [intake.loose, *(wave for wave in intake.waves if not wave.urgent)]
        lanes = [
            *(wave for wave in intake.waves if wave.urgent),
            *(lists + lone if self._lists_first else lone + lists),
        ]
        forecast = MemoryForecast(self._capacity, self._capacity - available)
        for req in running:
            if batch_of(req) is None and not req.finished():
                own = len(req.origin_input_ids) + len(req.output_ids)
                forecast.add(most_output(req) + EXTRA_STEPS, own)
        lookaheads = {id(batch): Lookahead(batch, forecast) for batch in intake.planned}
        pinned = intake.pinned_tokens
        reserve = max((batch.largest_need for batch in intake.planned), default=0)
        chosen: list[Req] = []

        def may_open(tokens: int, is_first: bool) -> bool:
            # What stays pinned must leave room for any request to run alone; the first of all
            # may always go when it has the pool to itself.
            nonlocal pinned
            alone = is_first and not running and not chosen
            if not alone and pinned + tokens + reserve > self._capacity:
                return False
            pinned += tokens
            return True

        for lane in lanes:
            room = max_requests - len(chosen)
            if max_tokens <= 0 or room <= 0 or forecast.refused:
                break
            if isinstance(lane, PlannedBatch):
                if can_wait(lane, lookaheads[id(lane)]):
                    continue
                picked = lane.select(max_tokens, room, lookaheads[id(lane)], may_open)
            else:
                picked = _first_that_fit(lane, max_tokens, room, forecast)
            chosen += picked
            max_tokens -= sum(map(tokens_to_prefill, picked))
        return chosen, forecast.refused

    def settle(self, chosen: list[Req], scheduled: set[int]) -> None:
        """Close a `choose`. scheduled: ids of the request objects that are in the next batch."""
        for req in chosen:
            planned = batch_of(req)
            if planned is not None:
                if id(req) in scheduled:
                    planned.member.matched = len(req.prefix_indices)
                planned.batch.settle(req, planned.member, id(req) in scheduled)
        if self._intake.loose:
            self._intake.loose = [req for req in self._intake.loose if id(req) not in scheduled]

    def give_up_pins(self, req: Req) -> None:
        """Let go of every pin that `req` does not need, since it could not run otherwise."""
        planned = batch_of(req)
        for batch in self._intake.planned:
            member = planned.member if planned is not None and planned.batch is batch else None
            batch.report.relaxed_tokens += batch.pins.relax(member)


def tokens_to_prefill(req: Req) -> int:
    """Tokens of a chosen request that have no KV yet; for one without a plan, at most."""
    planned = batch_of(req)
    if planned is None:
        return len(req.origin_input_ids) + len(req.output_ids)
    return planned.batch.tokens_to_prefill(req, planned.member)


def _first_that_fit(
    requests: list[Req], max_tokens: int, max_requests: int, forecast: MemoryForecast
) -> list[Req]:
    picked: list[Req] = []
    for req in requests[:max_requests]:
        tokens = tokens_to_prefill(req)
        if max_tokens <= 0 or not forecast.admit(tokens, most_output(req) + EXTRA_STEPS):
            break
        picked.append(req)
        max_tokens -= tokens
    return picked
