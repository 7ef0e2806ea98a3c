"""The books: one report of all requests since the start, and one of each list."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from sglang_batchllm.policy.batch import Batch
from sglang_batchllm.policy.distinct import DistinctTokens
from sglang_batchllm.policy.report import (
    BatchReport,
    BusyClock,
    Peaks,
    Report,
    prompt_tokens_run,
)
from sglang_batchllm.policy.requests import End, Request
from sglang_batchllm.policy.shards import Shard

logger = logging.getLogger(__name__)

KEPT_REPORTS = 64


class _List(NamedTuple):
    """A list that runs. moment: of `Peaks`, when it came."""

    batch: Batch
    report: BatchReport
    moment: int


class Ledger:
    """Told of all that happens to requests; `report` says what came of it.

    pinned_tokens: held by pins now, of all batches.
    """

    def __init__(self, page_size: int):
        self.pinned_tokens = 0
        self.pinned_in_windows = 0
        self._present = 0  # requests that have arrived and not ended
        self._busy = BusyClock()
        self._total = Report()
        self._distinct = DistinctTokens(page_size)
        self._peaks = Peaks()
        self._lists: dict[int, _List] = {}  # unfinished, by batch number
        self._closed: deque[BatchReport] = deque(maxlen=KEPT_REPORTS)

    @property
    def lists(self) -> list[Batch]:
        """Those that have not finished."""
        return [entry.batch for entry in self._lists.values()]

    def arrived(self, request: Request) -> None:
        self._present += 1
        self._busy.set(True)
        self._total.add_arrived(1, len(request.origin_input_ids))

    def planned(
        self, batch: Batch, instead_of: Batch | None = None, shard: Shard | None = None
    ) -> None:
        """instead_of: an earlier plan of the same list. shard: of a list that others have, too."""
        entry = _List(batch, BatchReport(shard=shard), self._peaks.now)
        if instead_of is not None:
            entry = self._lists.pop(instead_of.number)._replace(batch=batch)
            self._total.drop_plan(instead_of.plan)
            entry.report.drop_plan(instead_of.plan)
        self._total.add_plan(batch.plan)
        if batch.whole:
            entry.report.add_plan(batch.plan)
            self._lists[batch.number] = entry

    def pinned(self, tokens: int, in_windows: int) -> None:
        """So many tokens more are pinned, or fewer, and of those in the window pool."""
        self.pinned_tokens += tokens
        self.pinned_in_windows += in_windows
        self._total.note_pinned(self.pinned_tokens)

    def published(self, batch: Batch) -> None:
        """Shared prefixes of the batch have been computed."""
        entry = self._lists.get(batch.number)
        if entry is not None:
            entry.report.note_pinned(batch.pins.pinned_tokens)

    def kv_in_use(self, tokens: int) -> None:
        """So many tokens of the KV pool are in use, and can not be evicted."""
        self._peaks.note(tokens)

    def relaxed(self, batch: Batch, tokens: int) -> None:
        """Pinned tokens were given up."""
        for report in self._reports(batch):
            report.relaxed_tokens += tokens

    def computed_again(self, batch: Batch, tokens: int) -> None:
        """Tokens that have KV are computed for their logprobs, which were not kept."""
        for report in self._reports(batch):
            report.rescored_tokens += tokens

    def retracted(self, batch: Batch | None) -> None:
        for report in self._reports(batch):
            report.retractions += 1

    def ended(self, request: Request, end: End, batch: Batch | None) -> None:
        ran = prompt_tokens_run(request)
        if ran:
            self._distinct.add(request.origin_input_ids, request.extra_key)
        for report in self._reports(batch):
            report.add_ended(request, end, ran)
        self._present -= 1
        self._busy.set(self._present > 0)

    def retired(self, batch: Batch) -> None:
        """All requests of the batch have ended."""
        entry = self._lists.pop(batch.number, None)
        if entry is not None:
            entry.report.ended = time.time()
            entry.report.peak_kv_tokens = self._peaks.since(entry.moment)
            self._closed.append(entry.report)
            logger.info("%s", entry.report)

    def rest(self) -> None:
        """There is nothing else to do for some milliseconds."""
        self._distinct.rest()

    def report(self) -> dict[str, Any]:
        """For `json.dumps`: all requests since the start, the last lists, newest last, and those
        that run."""
        total = self._total.facts(self._busy.seconds)
        for entry in self._lists.values():
            entry.report.peak_kv_tokens = self._peaks.since(entry.moment)
        return {
            "total": total | {"distinct_tokens": self._distinct.count()},
            "batches": [report.to_dict() for report in self._closed],
            "running": [entry.report.to_dict() for entry in self._lists.values()],
        }

    def _reports(self, batch: Batch | None) -> Iterator[Report]:
        yield self._total
        entry = self._lists.get(batch.number) if batch is not None else None
        if entry is not None:
            yield entry.report
