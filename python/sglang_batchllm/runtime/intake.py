"""From requests to planned batches: lists at once, lone requests as they gather."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_batchllm.request_ids import parse_request_id
from sglang_batchllm.runtime.batch import PlannedBatch, batch_of
from sglang_batchllm.runtime.pins import PrefixStore
from sglang_batchllm.runtime.report import BatchReport

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

QUIET_SECONDS = 0.002
"""A gathering closes early once nothing has arrived for this long."""

KEPT_REPORTS = 64


class Intake:
    """Every request that waits, by how it is to be scheduled.

    batches: planned and not finished, oldest first; lists handed over whole.
    waves: planned and not finished, oldest first; requests gathered as they came.
    loose: requests to be scheduled as SGLang does, in order of arrival.
    gathering: requests that arrived alone and are not planned yet.

    A request that arrives alone joins the gathering, which becomes a wave after
    `gather_seconds` at most, or when arrivals pause, but not before the wave ahead of it is
    all scheduled: until then waiting costs nothing and the plan only gets better.
    agree: makes a decision that depends on this process's clock the same in all ranks.
    """

    def __init__(
        self,
        store: PrefixStore,
        page_size: int,
        gather_seconds: float,
        agree: Callable[[bool], bool],
    ):
        self._store = store
        self._page_size = page_size
        self._gather_seconds = gather_seconds
        self._agree = agree
        self.batches: list[PlannedBatch] = []
        self.waves: list[PlannedBatch] = []
        self.loose: list[Req] = []
        self.gathering: list[Req] = []
        self._first_arrival = self._last_arrival = 0.0
        self._gathered: BatchReport | None = None  # of all waves since none was left last
        self._reports: deque[BatchReport] = deque(maxlen=KEPT_REPORTS)

    def arrive(self, req: Req) -> None:
        """A request entered the waiting queue: new, or back after a retraction."""
        planned = batch_of(req)
        if req.to_finish is not None or req.finished():  # invalid or aborted: SGLang ends it
            if planned is not None:
                planned.batch.finish(planned.member, req)
            self.loose.append(req)
        elif planned is not None:
            planned.batch.enqueue(planned.member)
        elif _can_share(req):
            self._last_arrival = time.monotonic()
            if not self.gathering:
                self._first_arrival = self._last_arrival
            self.gathering.append(req)
        else:
            self.loose.append(req)

    def plan_list(self, requests: list[Req], queued: list[Req]) -> None:
        """Plan the requests of one call together.

        queued: those of them in the waiting queue; the grammar of the others is being compiled,
        and they arrive later. A list of one is no batch, and counts as a lone request.
        """
        shareable = [req for req in requests if req.to_finish is None and _can_share(req)]
        if len(shareable) > 1:
            self._plan(shareable, self.batches)
        for req in queued:
            self.arrive(req)

    def close_gathering(self) -> None:
        """Turn the gathering into a wave if it is time."""
        if not self.gathering or any(wave.num_waiting for wave in self.waves):
            return
        now = time.monotonic()
        due = (
            now - self._first_arrival >= self._gather_seconds
            or now - self._last_arrival >= QUIET_SECONDS
        )
        if not self._agree(due):
            return
        requests, self.gathering = self.gathering, []
        if len(requests) == 1 and not _is_later_turn(requests[0]):
            self.loose += requests
        else:
            self._plan(requests, self.waves)
            for req in requests:
                self.arrive(req)

    def expect_no_later_turns(self, batch_id: str) -> None:
        """The texts of this list, as `request_ids` names it, are not held any more."""
        for batch in self.batches:
            if batch.id == batch_id:
                batch.continued[:] = False

    def drop(self, waiting: set[int]) -> None:
        """Forget requests that left the waiting queue without running (aborts, time-outs).

        waiting: ids of the request objects in it.
        """
        self.loose = [req for req in self.loose if id(req) in waiting]
        self.gathering = [req for req in self.gathering if id(req) in waiting]
        for batch in self.planned:
            for req in batch.waiting():
                planned = batch_of(req)
                if planned is not None and id(req) not in waiting:
                    batch.finish(planned.member, req)

    def retire(self) -> None:
        """Close the report of every batch that has finished."""
        for batch in self.batches:
            if not batch.unfinished:
                self._close(batch.report)
        self.batches = [batch for batch in self.batches if batch.unfinished]
        self.waves = [wave for wave in self.waves if wave.unfinished]
        if self._gathered is not None and not self.waves and not self.gathering:
            self._close(self._gathered)
            self._gathered = None

    @property
    def planned(self) -> list[PlannedBatch]:
        """Lists and waves, unfinished ones at least."""
        return [*self.batches, *self.waves]

    @property
    def pinned_tokens(self) -> int:
        return sum(batch.pins.pinned_tokens for batch in self.planned)

    def note_kv_use(self, tokens: int) -> None:
        """`tokens` of the KV pool are in use and can not be evicted."""
        for batch in self.planned:
            batch.report.peak_kv_tokens = max(batch.report.peak_kv_tokens, tokens)

    def to_dict(self) -> dict[str, Any]:
        """The reports of the last batches, newest last, and of those that run."""
        running = [batch.report for batch in self.batches]
        if self._gathered is not None:
            running.append(self._gathered)
        return {
            "batches": [report.to_dict() for report in self._reports],
            "running": [report.to_dict() for report in running],
        }

    def _plan(self, requests: list[Req], into: list[PlannedBatch]) -> None:
        whole = into is self.batches
        if whole:
            report = BatchReport("batch")
        else:
            report = self._gathered = self._gathered or BatchReport("gathered")
        into.append(PlannedBatch(requests, self._store, self._page_size, report, whole))

    def _close(self, report: BatchReport) -> None:
        report.ended = time.time()
        self._reports.append(report)
        logger.info("%s", report)


def _is_later_turn(req: Req) -> bool:
    asked = parse_request_id(req.rid)
    return asked is not None and asked.turn == "later"


def _can_share(req: Req) -> bool:
    """Whether equal token ids mean equal KV for this request, and it is no session's."""
    return (
        req.input_embeds is None
        and req.positional_embed_overrides is None
        and req.session is None
        and len(req.origin_input_ids) > 0
    )
