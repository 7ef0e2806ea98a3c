"""Rows to a server, window by window, and their answers to records, until all have one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_batchllm.jobs.errors import BusyError, JobError, RowError, ServerLostError
from sglang_batchllm.jobs.hosts import Host
from sglang_batchllm.jobs.inputs import Inputs
from sglang_batchllm.jobs.memory import Memory
from sglang_batchllm.jobs.order import Order
from sglang_batchllm.jobs.records import Answer, answer_record, usage_of
from sglang_batchllm.jobs.results import Results
from sglang_batchllm.jobs.rows import Row
from sglang_batchllm.jobs.server import About, Request, Server, encoded
from sglang_batchllm.jobs.status import Status

WINDOW_BYTES = 64 << 20
MAX_WINDOW = 8192
"""Of a window at most. What is planned together and sent ahead takes memory in the server."""

MIN_WINDOW = 512

TRIALS = 8
"""Rows that were with an engine when it died go in so many parts, one after the other, until the
one to blame is alone."""

TRIES = 3
"""Times that a request is sent which the server is too busy for, or aborts."""

BUSY_SECONDS = 1.0

COUNT_SECONDS = 5.0
"""Between two looks at the server's counts."""

ALONE = 2
"""Times that an engine dies with no other request before that one is to blame."""

MAX_DEATHS = 8
"""Of engines, one after the other, without an answer in between."""


@dataclass
class Dispatch:
    """wanted: the rows to run. tell: is called when `status` has changed."""

    rows: Inputs
    wanted: Order
    results: Results
    memory: Memory
    status: Status
    tell: Callable[[], None]

    def __post_init__(self) -> None:
        self._open = np.zeros(len(self.rows.index), bool)  # rows that are to be sent
        self._open[self.wanted.rows] = True
        self._sent: dict[int, Row] = {}  # and not answered
        self._late: list[int] = []  # to send again
        self._tries: Counter[int] = Counter()
        self._room = asyncio.Event()
        self._deaths = 0  # since the last answer
        self._condemned: dict[int, bytes] = {}  # records, for when an engine answers again
        self._done = asyncio.Event()
        suspects, alone = self.memory.suspects, self.memory.alone
        self.memory.suspects = {row: suspects[row] for row in suspects if self._open[row]}
        # What ended an earlier run without a record gets one more try: the engine may be another.
        self.memory.alone = {row: min(alone[row], ALONE - 1) for row in alone if self._open[row]}

    async def run(self, host: Host, server: Server, about: About) -> None:
        """Until every row has a record."""
        most = min(MAX_WINDOW, max(MIN_WINDOW, 2 * (about.running or 0)))
        status = self.status
        windows = self.wanted.windows(self.rows.index.places["size"], most, WINDOW_BYTES)
        counting: asyncio.Task[None] | None = None
        if about.running:
            with contextlib.suppress(ServerLostError):
                before = (await server.report())["total"]
                counting = asyncio.create_task(self._count_tokens(server, before))
        try:
            while True:
                try:
                    await self._try_suspects(server, about)
                    await self._stream(server, about, windows, most)
                    self._record_condemned()
                    break
                except ServerLostError as lost:
                    if counting is not None:
                        counting.cancel()
                        status.tokens_saved = status.computed_tokens = None
                    self._blame(lost)
                    status.phase = "restarting"
                    self.tell()
                    server, about = await host.again()
                    status.phase = "running"
                    self.tell()
            if counting is not None and not status.deaths:
                self._done.set()
                await counting
        finally:
            if counting is not None:
                counting.cancel()
            self.rows.close()

    async def _try_suspects(self, server: Server, about: About) -> None:
        """What was with an engine when it died, in parts, the most suspect first."""
        suspects = self.memory.suspects
        while suspects := {row: suspects[row] for row in suspects if self._open[row]}:
            often = max(suspects.values())
            rows = [row for row, times in suspects.items() if times == often]
            size = -(-len(rows) // TRIALS)
            for start in range(0, len(rows), size):
                await self._window(server, about, rows[start : start + size])
            suspects = self.memory.suspects
            if not suspects.keys().isdisjoint(self._late):
                await asyncio.sleep(BUSY_SECONDS)
            self._late = [row for row in self._late if self._open[row] and row not in suspects]

    async def _stream(
        self, server: Server, about: About, windows: Iterator[np.ndarray], most: int
    ) -> None:
        """Windows until there are no more, each sent when less than one is unanswered."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            for window in windows:
                rows = window[self._open[window]].tolist()
                if not rows:
                    continue
                tasks.add(asyncio.create_task(self._window(server, about, rows)))
                await asyncio.sleep(0)  # it notes what it sends
                while len(self._sent) >= most:
                    self._room.clear()
                    await self._wait(tasks)
            while tasks or self._late:
                if not tasks:
                    await asyncio.sleep(BUSY_SECONDS)
                    rows, self._late = self._late, []
                    tasks.add(asyncio.create_task(self._window(server, about, rows)))
                self._room.clear()
                await self._wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, tasks: set[asyncio.Task[None]]) -> None:
        """Until a window has ended, or there is room for another; raises what it raised."""
        room = asyncio.create_task(self._room.wait())
        try:
            done, _ = await asyncio.wait({*tasks, room}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            room.cancel()
        for task in done - {room}:
            tasks.discard(task)  # type: ignore[arg-type]
            task.result()

    async def _window(self, server: Server, about: About, rows: Sequence[int]) -> None:
        """Send rows and record their answers."""
        for row in rows:
            self._sent[row] = self.rows.read(row)
        self.tell()
        requests = [
            Request(row, self._sent[row].url, encoded(self._sent[row].body)) for row in rows
        ]
        run = server.run_list if about.running else server.run_each
        while True:
            try:
                async with contextlib.aclosing(run(requests)) as answers:
                    async for row, answer in answers:
                        self._take(row, answer)
                break
            except BusyError as busy:
                self.status.note = str(busy)
                self.tell()
                await asyncio.sleep(BUSY_SECONDS)
        if any(row in self._sent for row in rows):
            raise ServerLostError(f"{server.url} left requests without an answer")

    def _take(self, row: int, answer: Answer) -> None:
        sent = self._sent.pop(row)
        self._deaths = 0
        self._record_condemned()
        self._tries[row] += 1
        if _is_to_repeat(answer) and self._tries[row] < TRIES:
            self._late.append(row)
        else:
            self._record(row, answer_record(sent.custom_id, answer), answer.status == 200)
            self.status.output_tokens += usage_of(answer.content).get("completion_tokens") or 0
        self._room.set()
        self.tell()

    def _record(self, row: int, record: bytes, ok: bool) -> None:
        self.results.append(record, ok)
        self._open[row] = False
        self._tries.pop(row, None)
        self.memory.suspects.pop(row, None)
        self.memory.alone.pop(row, None)
        if ok:
            self.status.done += 1
        else:
            self.status.failed += 1

    def _record_condemned(self) -> None:
        """An engine answers without them, or nothing else is left to run."""
        while self._condemned:
            row, record = self._condemned.popitem()
            self._record(row, record, ok=False)

    def _blame(self, lost: ServerLostError) -> None:
        """The server was lost: whatever it had is suspect."""
        self._deaths += 1
        self.status.deaths += 1
        self.status.note = str(lost)
        suspects, alone, sent = self.memory.suspects, self.memory.alone, self._sent
        for row in sent:
            suspects[row] = suspects.get(row, 0) + 1
        if len(sent) == 1:
            (row,) = sent
            alone[row] = alone.get(row, 0) + 1
            if alone[row] >= ALONE:
                error = RowError(
                    "engine_died",
                    f"the engine died {suspects[row]} times while it had this request: {lost}",
                    sent[row].custom_id,
                )
                file, line = self.rows.place(row)
                self._condemned[row] = self.rows.error_record(file, line, error)
                self._open[row] = False
        sent.clear()
        self.memory.save()
        if self._deaths >= MAX_DEATHS:
            raise JobError(
                f"the server was lost {self._deaths} times without an answer in between, the last "
                f"time because {lost}; nothing that is done is lost, run the same command again"
            )

    async def _count_tokens(self, server: Server, before: dict[str, Any]) -> None:
        """Now and then, and once when all is done. before: the server's totals, before this run."""
        with contextlib.suppress(ServerLostError):
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._done.wait(), COUNT_SECONDS)
                now = (await server.report())["total"]
                self.status.computed_tokens = now["computed_tokens"] - before["computed_tokens"]
                self.status.tokens_saved = now["tokens_saved"] - before["tokens_saved"]
                if self._done.is_set():
                    return


def _is_to_repeat(answer: Answer) -> bool:
    """Whether the server says nothing about the request itself."""
    if answer.status in (429, 503):
        return True
    choices = answer.content.get("choices") if isinstance(answer.content, dict) else None
    return any(choice.get("finish_reason") == "abort" for choice in choices or ())
