"""Which waiting requests the next prefill step may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_batchllm.runtime.batch import PlannedBatch, batch_of
from sglang_batchllm.runtime.intake import Intake

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Admission:
    """Chooses from an intake; SGLang's PrefillAdder then takes what fits into memory.

    Lists handed over whole and requests that came one by one take turns at going first, so
    neither starves; within each, the older goes first.
    """

    def __init__(self, intake: Intake, capacity: int):
        """capacity: tokens of the KV pool."""
        self._intake = intake
        self._capacity = capacity
        self._lists_first = True

    def choose(self, running: int, max_tokens: int, max_requests: int) -> list[Req]:
        """Claim up to `max_requests` requests with about `max_tokens` tokens to prefill.

        running: requests that hold KV now. `settle` must follow for every request returned.
        """
        intake = self._intake
        intake.close_gathering()
        self._lists_first = not self._lists_first
        waves_lane: list[list[Req] | PlannedBatch] = [intake.loose, *intake.waves]
        lanes = (
            [*intake.batches, *waves_lane] if self._lists_first else [*waves_lane, *intake.batches]
        )
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
            if max_tokens <= 0 or room <= 0:
                break
            if isinstance(lane, PlannedBatch):
                picked = lane.select(max_tokens, room, may_open)
            else:
                picked = _first_that_fill(lane, max_tokens, room)
            chosen += picked
            max_tokens -= sum(len(req.origin_input_ids) for req in picked)
        return chosen

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


def _first_that_fill(requests: list[Req], max_tokens: int, max_requests: int) -> list[Req]:
    picked: list[Req] = []
    for req in requests[:max_requests]:
        if max_tokens <= 0:
            break
        picked.append(req)
        max_tokens -= len(req.origin_input_ids) + len(req.output_ids)
    return picked
