"""Stores, files and jobs for tests of the batch API, without an engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_batchllm.jobs.records import Answer, answer_record, read_record
from sglang_batchllm.jobs.status import Counts
from sglang_batchllm.server.batches.batch_store import BatchRecord, Order
from sglang_batchllm.server.batches.collect import error_path, output_path
from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.file_store import FileRecord
from sglang_batchllm.server.batches.ids import new_file_id
from sglang_batchllm.server.batches.limits import Limits
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.tending import Tending

COMPLETIONS = "/v1/completions"


@dataclass
class Clock:
    """A clock that tests turn."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def make_store(root: Path, clock: Callable[[], float] | None = None, **limits: int) -> Store:
    options = {} if clock is None else {"clock": clock}
    return Store(Directory(root), Limits(**limits), **options)


def requests(count: int, url: str = COMPLETIONS, **body: Any) -> bytes:
    """A batch file. The custom_ids are r0, r1 and so on."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"r{i}",
                "method": "POST",
                "url": url,
                "body": {"model": "m", "prompt": f"Number {i}"} | body,
            }
        ).encode()
        + b"\n"
        for i in range(count)
    )


def keep(store: Store, data: bytes, name: str = "in.jsonl", seconds: int | None = None):
    """As if it had been uploaded."""
    file_id = new_file_id()
    store.directory.upload(file_id).write_bytes(data)
    return store.files.keep_upload(file_id, name, seconds)


def ordered(store: Store, data: bytes | FileRecord, **options: Any) -> BatchRecord:
    """A new batch."""
    record = keep(store, data) if isinstance(data, bytes) else data
    order = {"endpoint": COMPLETIONS, "hours": 24} | options
    return store.batches.create(Order(record.id, **order))


@dataclass
class FakeJobs:
    """What `run_job` does, in small: answers one request after the other, and resumes.

    hold: how many requests are answered in all before it waits for ever. raises: what
    attempts raise before they do anything, one each.
    """

    store: Store
    hold: int | None = None
    raises: list[Exception] = field(default_factory=list)
    answered: int = 0
    at_once: int = 0
    most_at_once: int = 0

    async def __call__(self, record: BatchRecord, watch: Callable[[Counts], None]):
        if self.raises:
            raise self.raises.pop(0)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._run(record, watch)
        finally:
            self.at_once -= 1

    async def _run(self, record: BatchRecord, watch: Callable[[Counts], None]) -> Counts:
        rows = self.store.directory.content(record.input_file_id).read_bytes().splitlines()
        output = output_path(self.store.directory, record.id)
        errors = error_path(self.store.directory, record.id)
        ids = done_ids(output) + done_ids(errors)
        failed = len(done_ids(errors))
        watch(Counts(len(rows), len(ids) - failed, failed))
        for row in map(json.loads, rows):
            if row["custom_id"] in ids:
                continue
            await self._wait()
            ok = "bad" not in row["body"]
            answer = Answer(200 if ok else 400, {"text": row["body"].get("prompt")})
            with (output if ok else errors).open("ab") as file:
                file.write(answer_record(row["custom_id"], answer))
            ids.append(row["custom_id"])
            failed += not ok
            self.answered += 1
            watch(Counts(len(rows), len(ids) - failed, failed))
            await asyncio.sleep(0)
        await self._wait()
        return Counts(len(rows), len(ids) - failed, failed)

    async def _wait(self) -> None:
        if self.hold is not None and self.answered >= self.hold:
            await asyncio.Event().wait()


def done_ids(path: Path) -> list[str]:
    if not path.exists():
        return []
    found = [read_record(line).custom_id for line in path.read_bytes().splitlines()]
    return [each for each in found if each is not None]


async def tend_until(
    store: Store, jobs: Any, is_done: Callable[[], bool], seconds: float = 20
) -> None:
    """A worker works in this process until something is so."""
    stop = asyncio.Event()
    serving = asyncio.create_task(Tending(store, jobs).serve(stop))
    try:
        async with asyncio.timeout(seconds):
            while not is_done():
                if serving.done():
                    serving.result()
                await asyncio.sleep(0.01)
    finally:
        stop.set()
        await serving


def work_off(store: Store, jobs: Any = None, seconds: float = 20) -> None:
    """All batches that are open."""

    async def work() -> None:
        await tend_until(store, jobs or FakeJobs(store), lambda: not store.batches.open(), seconds)

    asyncio.run(work())
