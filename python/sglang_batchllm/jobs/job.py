"""A job: rows of files to records in files, through a server, whatever dies in between."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_batchllm.jobs.dispatch import Dispatch
from sglang_batchllm.jobs.errors import JobError, RowError
from sglang_batchllm.jobs.hosts import Host, Running
from sglang_batchllm.jobs.index import BadRow, Index
from sglang_batchllm.jobs.inputs import Inputs
from sglang_batchllm.jobs.memory import Identity, Memory
from sglang_batchllm.jobs.model import model_identity, tokenizer_here
from sglang_batchllm.jobs.order import Order, plan_rows
from sglang_batchllm.jobs.reading import Reading, read_inputs
from sglang_batchllm.jobs.results import Done, Results
from sglang_batchllm.jobs.rows import URLS, Rules
from sglang_batchllm.jobs.server import About, Server
from sglang_batchllm.jobs.status import Counts, Phase, Status

SYNC_SECONDS = 5.0
"""What was answered longer ago than this survives the machine."""


@dataclass(frozen=True)
class Files:
    """inputs: in OpenAI's batch format. output: of records, appended to. errors: where those of
    requests that failed go, None for the output."""

    inputs: tuple[Path, ...]
    output: Path
    errors: Path | None = None


@dataclass
class Job:
    """What is to be run, and where.

    reading: how rows are read; with `rules.models` None, what the server serves is asked of it.
    model: what identifies the model, None where only the server can tell.
    watch: is told of every change of the status.
    """

    files: Files
    host: Host
    reading: Reading
    model: dict[str, Any] | None = None
    watch: Callable[[Status], None] = lambda status: None
    status: Status = field(default_factory=Status)

    async def run(self) -> Status:
        """Everything that has no record yet. Cancelling it leaves valid files, and `run` of another
        job with the same files goes on from there. Raises JobError for what nobody can run."""
        memory = Memory.beside(self.files.output)
        results = Results.at(self.files.output, self.files.errors)
        results.open()
        starting: asyncio.Task[tuple[Server, About]] | None = None
        try:
            done = Done.of(results)
            # The engine loads while the input is read, where it is sure to be needed.
            if self.model is None or not done.count:
                starting = asyncio.create_task(self.host.start())
            if self.model is None:
                assert starting is not None
                _, about = await starting
                self._take_from(about)
            with tempfile.TemporaryDirectory(
                prefix=f".{self.files.output.name}.", dir=self.files.output.parent
            ) as folder:
                await self._run(memory, results, done, Path(folder) / "ids", starting)
            results.sync()
        finally:
            if starting is not None:
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError, JobError):
                    await starting
            await self.host.stop()
            results.close()
        return self.status

    def _take_from(self, about: About) -> None:
        self.model = model_identity(about.model_path)
        rules = replace(self.reading.rules, models=about.models)
        tokenizer = self.reading.tokenizer or tokenizer_here(about)
        self.reading = replace(self.reading, rules=rules, tokenizer=tokenizer)

    async def _run(
        self,
        memory: Memory,
        results: Results,
        done: Done,
        ids_path: Path,
        starting: asyncio.Task[tuple[Server, About]] | None,
    ) -> None:
        status = self.status
        self._tell("reading")
        index, digest = await self._read(ids_path)
        paths = [str(path) for path in self.files.inputs]
        params = dict(self.reading.rules.params)
        identity = Identity(paths, digest, self.model or {}, params)
        memory.check(identity, self.files.output, done.count > 0)
        memory.save()
        inputs = Inputs(self.files.inputs, index, self.reading.rules, memory.names)
        wanted = self._record_bad_rows(inputs, results, done)
        if wanted.any():
            self._tell("planning")
            plan = await asyncio.to_thread(plan_rows, index)
            status.plan = plan.report if index.unit == "tokens" else None
            order = Order.of(plan, wanted)
            del plan
            self._tell("starting")
            server, about = await (starting or self.host.start())
            status.running_since = time.monotonic()
            self._tell("running")
            dispatch = Dispatch(inputs, order, results, memory, status, self._tell)
            syncing = asyncio.create_task(self._sync(results))
            try:
                await dispatch.run(self.host, server, about)
            finally:
                syncing.cancel()
        self._tell("done")

    async def _read(self, ids_path: Path) -> tuple[Index, str]:
        left = threading.Event()

        def note(rows: int) -> None:
            if left.is_set():
                raise InterruptedError
            self.status.rows_read = rows

        try:
            return await asyncio.to_thread(
                read_inputs, self.files.inputs, self.reading, ids_path, note
            )
        except OSError as error:
            raise JobError(
                f"{error.filename or ids_path.parent}: {error.strerror}; nothing has run yet"
            ) from None
        finally:
            left.set()  # the thread goes on where this call is cancelled

    def _record_bad_rows(self, inputs: Inputs, results: Results, done: Done) -> np.ndarray:
        """Of rows that can't run; returns which of the others are still to run, bool[n]."""
        status, index = self.status, inputs.index
        repeated = index.repeated()
        bad = [*index.bad, *(_repetition(inputs, *pair) for pair in repeated.tolist())]
        status.total = len(index) + len(index.bad)
        status.done, status.failed = done.ok, done.count - done.ok
        status.found = done.count
        status.output_tokens = status.output_tokens_before = done.output_tokens
        for row in bad:
            if (inputs.name(row.file), row.line) not in done.places:
                record = inputs.error_record(row.file, row.line, row.error)
                results.append(record, ok=False)
                status.failed += 1
        wanted = np.ones(len(index), bool)
        wanted[repeated[:, 1]] = False
        files = {inputs.name(file): file for file in range(len(inputs.paths))}
        places = [(files[name], line) for name, line in done.places if name in files]
        for rows in (index.find(done.digests), index.at(places)):
            wanted[rows[rows >= 0]] = False
        return wanted

    async def _sync(self, results: Results) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(results.sync)

    def _tell(self, phase: Phase | None = None) -> None:
        if phase is not None:
            self.status.phase = phase
        self.watch(self.status)


def _repetition(inputs: Inputs, first: int, again: int) -> BadRow:
    """A row with the custom_id of an earlier one."""
    first_file, first_line = inputs.place(first)
    name = inputs.name(first_file)
    of = f" of {name}" if name else ""
    message = f"line {first_line}{of} has this custom_id, too; give each request one of its own"
    error = RowError("duplicate_custom_id", message, inputs.read(again).custom_id)
    return BadRow(*inputs.place(again), error)


async def run_job(
    files: Files,
    server: Server,
    *,
    url: str | None = None,
    watch: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Run a job on a server that is there.

    url: the only one of `rows.URLS` that rows may name, None for any. watch: is told of every
    change. Raises JobError, and as `Job.run` on cancellation.
    """
    reading = Reading(Rules(urls=URLS if url is None else (url,)))
    job = Job(files, Running(server), reading, watch=lambda status: watch(status.counts))
    return (await job.run()).counts
