"""The worker's loop: which batches are worked off now."""

from __future__ import annotations

import asyncio
import contextlib

from sglang_batchllm.server.batches.batch_store import BatchRecord
from sglang_batchllm.server.batches.running import Running, RunRecord
from sglang_batchllm.server.batches.store import Store

AT_ONCE = 8
"""Batches that are worked off side by side. Others wait for their turn, the oldest first."""

POLL_SECONDS = 0.25
"""How soon a new batch, or that one was cancelled, is noticed."""


class Tending:
    """All batches of a store."""

    def __init__(self, store: Store, run_record: RunRecord):
        self._store = store
        self._run_record = run_record
        self._running: dict[str, tuple[Running, asyncio.Task[None]]] = {}

    async def serve(self, stop: asyncio.Event) -> None:
        """Until `stop`; batches that have not ended are left as they are then. Raises what a batch
        cannot handle, such as a store that is gone."""
        try:
            while not stop.is_set():
                await self._tend()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), POLL_SECONDS)
        finally:
            tasks = [task for _, task in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tend(self) -> None:
        for batch_id, (running, task) in [*self._running.items()]:
            if task.done():
                del self._running[batch_id]
                task.result()
            else:
                await running.store_counts()
        for record in await asyncio.to_thread(self._store.batches.open):
            self._look_at(record)

    def _look_at(self, record: BatchRecord) -> None:
        cancelled = record.status == "cancelling"
        expired = self._store.clock() >= record.expires_at
        ends = cancelled or expired or record.outcome is not None
        if record.id not in self._running and (ends or len(self._running) < AT_ONCE):
            running = Running(self._store, record, self._run_record)
            self._running[record.id] = running, asyncio.create_task(running.run())
        if record.id in self._running and (cancelled or expired):
            self._running[record.id][0].stop("cancelled" if cancelled else "expired")
