"""One batch in the worker, from its beginning, or wherever it was left, to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from sglang_batchllm.jobs.errors import JobError, ServerAwayError
from sglang_batchllm.jobs.status import Counts
from sglang_batchllm.server.batches.batch_store import BatchRecord
from sglang_batchllm.server.batches.collect import collect, error_path, output_path
from sglang_batchllm.server.batches.errors import shown
from sglang_batchllm.server.batches.states import Outcome
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.unfinished import record_expired

logger = logging.getLogger(__name__)

ATTEMPTS = 6
"""How often a batch is begun, or gone on with, that makes no progress in between."""

RETRY_SECONDS = 1.0
"""Before the second attempt; twice as long before each further one."""

Watch = Callable[[Counts], None]
RunRecord = Callable[[BatchRecord, Watch], Awaitable[Counts]]
"""Works off a batch's requests, as `jobs.job.run_job` does."""

Reason = Literal["cancelled", "expired"]


class Running:
    """What the worker does for a batch. `run` ends when the batch has."""

    def __init__(self, store: Store, record: BatchRecord, run_record: RunRecord):
        self._store = store
        self._record = record
        self._run_record = run_record
        self._reason: Reason | None = None
        self._stopped = asyncio.Event()
        self._seen = self._stored = Counts(record.total, record.completed, record.failed)
        self._begun = record.status != "validating"

    def stop(self, reason: Reason) -> None:
        """Its requests are not worked off any further."""
        self._reason = self._reason or reason
        self._stopped.set()

    async def store_counts(self) -> None:
        """For clients to see, if there is anything new."""
        seen = self._seen
        if seen == self._stored or not seen.total:
            return
        self._stored = seen
        if not self._begun:
            self._begun = True
            await asyncio.to_thread(self._store.batches.begin, self._record.id)
        await asyncio.to_thread(
            self._store.batches.count, self._record.id, seen.total, seen.done, seen.failed
        )

    async def run(self) -> None:
        """Cancel it to leave the batch as it is, for another worker to go on with."""
        record, batches = self._record, self._store.batches
        if record.outcome is None:
            outcome, errors = await self._work_off()
            await self.store_counts()
            await asyncio.to_thread(batches.decide, record.id, outcome, errors)
        await asyncio.to_thread(collect, self._store.directory, batches, record)

    async def _work_off(self) -> tuple[Outcome, list[dict[str, Any]] | None]:
        attempt = 0
        while self._reason is None:
            before = self._seen
            try:
                if await self._attempt():
                    if not self._seen.total:
                        return "failed", [_error("empty_file", "the input file has no requests")]
                    return "completed", None
            except Exception as error:
                if isinstance(error, JobError) and not isinstance(error, ServerAwayError):
                    return "failed", [_error("invalid_batch", self._for_client(str(error)))]
                attempt = 1 if self._has_progressed(before) else attempt + 1
                logger.warning("%s was interrupted: %s", self._record.id, shown(error, 1000))
                if attempt >= ATTEMPTS:
                    reason = shown(error, 1000)
                    message = f"it was interrupted {attempt} times, the last time by {reason}"
                    return "failed", [_error("interrupted", self._for_client(message))]
                with contextlib.suppress(TimeoutError):
                    pause = RETRY_SECONDS * 2 ** (attempt - 1)
                    await asyncio.wait_for(self._stopped.wait(), pause)
        if self._reason == "expired":
            await self._expire()
        return self._reason, None

    async def _attempt(self) -> bool:
        """Whether all requests have been worked off; False if `stop` was called before."""
        folder = self._store.directory.run(self._record.id)
        await asyncio.to_thread(folder.mkdir, mode=0o700, exist_ok=True)
        job = asyncio.ensure_future(self._run_record(self._record, self._watch))
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait([job, stopped], return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                self._watch(job.result())
            return job.done()
        finally:
            stopped.cancel()
            job.cancel()
            await asyncio.wait([job])

    def _watch(self, counts: Counts) -> None:
        self._seen = counts

    def _has_progressed(self, before: Counts) -> bool:
        return self._seen.done + self._seen.failed > before.done + before.failed

    async def _expire(self) -> None:
        directory, record = self._store.directory, self._record
        folder = directory.run(record.id)
        await asyncio.to_thread(folder.mkdir, mode=0o700, exist_ok=True)
        try:
            done, failed = await asyncio.to_thread(
                record_expired,
                directory.content(record.input_file_id),
                output_path(directory, record.id),
                error_path(directory, record.id),
            )
        except (JobError, OSError) as error:  # it has expired all the same
            logger.warning("%s expired, and not all its requests say so: %s", record.id, error)
        else:
            self._seen = Counts(done + failed, done, failed)

    def _for_client(self, message: str) -> str:
        """Without paths of the server."""
        directory, record = self._store.directory, self._record
        for path, name in (
            (directory.content(record.input_file_id), "the input"),
            (output_path(directory, record.id), "the output"),
            (error_path(directory, record.id), "the file of errors"),
            (directory.root, "the server's directory"),
        ):
            message = message.replace(str(path), name)
        return message


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": None}
