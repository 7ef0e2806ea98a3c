"""The server's side of a hand-over: requests that come together, and are planned together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from itertools import islice

from sglang_batchllm.server.body import LineSplitter, Share, read_line
from sglang_batchllm.server.errors import error_reply
from sglang_batchllm.server.front import FrontEnd, Prepared, Request
from sglang_batchllm.wire.lines import GENERATE, answer_line
from sglang_batchllm.wire.request_ids import RequestId

HEARTBEAT_SECONDS = 1.0
"""An empty line is sent when nothing else was for this long, so that each side notices when the
other is gone."""

TEXT_SLICE = 1 << 17
"""Characters to tokenize before other work of the process gets its turn."""

SLICE = 256
"""Requests to start or to cancel before other work of the process gets its turn."""

QUIET_SECONDS = 0.25
"""Requests that are ready are sent without the others once none has become ready for this long and
none is worked on. What they share with those that come later may have been given up by then."""

TURNS = 8
"""Of the event loop that a request needs, about, from its connection to the scheduler."""


async def let_others_in() -> None:
    """Between slices of a list: a request that comes by itself waits for one, not for as many as it
    takes turns."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


@dataclass(slots=True)
class _Entry:
    """A line's request, and its place among the lines."""

    index: int
    program: int
    request: Request
    size: int  # bytes of a prompt that is tokenized as the request starts, else 0


class HandOver:
    """One list of requests: each is handled by SGLang like a request of its own, with its own
    errors, but they reach the scheduler in one message, which plans them together.

    In order: `add` and `finish`, `answers`, and `abandon` in any case. `registry.Registry` makes
    them. yields: all others go first. open_batches: by id; this one leaves it when it is abandoned.
    """

    def __init__(
        self,
        front: FrontEnd,
        batch: str,
        yields: bool,
        share: Share,
        open_batches: dict[str, HandOver],
    ):
        self._front = front
        self._batch = batch
        self._yields = yields
        self._share = share
        self._open_batches = open_batches
        self._lines = LineSplitter()
        self._num_lines = 0
        self._entries: list[_Entry] = []
        self._untokenized: list[Request] = []
        self._untokenized_size = 0  # characters
        self._going_on: set[int] = set()  # programs that will send more
        self._unprepared: set[str] = set()  # ids of requests that SGLang has yet to prepare
        self._prepared: list[Prepared] = []  # and not sent
        self._turns: dict[str, tuple[str, int]] = {}  # by request id
        self._progress = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # a request each
        self._starting: asyncio.Task[None] | None = None
        self._unanswered = 0
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()

    # The requests come

    async def add(self, chunk: bytes) -> None:
        """Take a piece of the body, lines of `wire.lines.request_line`, and tokenize their texts.

        A line of any other kind is answered like a request that failed. Raises RefusedError for
        more than the limits allow; nothing has reached the scheduler then.
        """
        self._share.take(len(chunk), 0)
        for line in self._lines.feed(chunk):
            await self._take(line)

    async def finish(self) -> None:
        """The body has ended; a last line need not. Raises as `add` does."""
        for line in self._lines.finish():
            await self._take(line)

    async def _take(self, line: bytes) -> None:
        self._share.take(0, 1)
        index = self._num_lines
        self._num_lines += 1
        self._unanswered += 1
        try:
            program, more, url, body = read_line(line)
            request = self._front.read(url, body)
        except Exception as error:
            reply = error_reply(error)
            self._answers.put_nowait(answer_line(index, reply.status_code, reply.content))
        else:
            if more:
                self._going_on.add(program)
            size = 0 if url == GENERATE else len(line)
            self._entries.append(_Entry(index, program, request, size))
            if characters := self._front.untokenized(request):
                self._untokenized.append(request)
                self._untokenized_size += characters
        if self._untokenized_size >= TEXT_SLICE:
            self._tokenize()
            await self._let_others_in()
        elif index % SLICE == SLICE - 1:
            await self._let_others_in()

    async def _let_others_in(self) -> None:
        self._front.settle()
        await let_others_in()

    def _tokenize(self) -> None:
        requests, self._untokenized = self._untokenized, []
        self._untokenized_size = 0
        self._front.tokenize(requests)

    # They go to the scheduler

    async def _start(self) -> None:
        if self._untokenized:
            self._tokenize()
        entries, self._entries = self._entries, []
        for entry in entries:
            turn = "first" if entry.program in self._going_on else "once"
            rid = str(RequestId(turn, self._batch, entry.program, entry.index))
            self._turns[rid] = (turn, entry.program)
        self._unprepared = set(self._turns)
        number = size = 0
        for rid, entry in zip(self._turns, entries, strict=True):
            task = asyncio.create_task(self._run(entry.index, rid, entry.request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            number += 1
            size += entry.size
            if number == SLICE or size >= TEXT_SLICE:
                number = size = 0
                await self._let_others_in()
        del entries
        await self._send_as_they_get_ready()

    async def _send_as_they_get_ready(self) -> None:
        """All together, if SGLang lets all pass. While it does not (a pause, a weight update, an
        adapter that is loading), those that are ready go without the others: what keeps the
        others may itself wait for these."""
        while self._unprepared:
            self._progress.clear()
            try:
                await asyncio.wait_for(
                    self._progress.wait(), QUIET_SECONDS if self._prepared else None
                )
            except TimeoutError:
                if not self._front.is_preparing():
                    await self._send()
        await self._send()

    async def _send(self) -> None:
        prepared, self._prepared = self._prepared, []
        if prepared:
            turns = {request.rid: self._turns[request.rid] for request in prepared}
            await self._front.send(self._batch, prepared, turns, self._yields)

    async def _run(self, index: int, rid: str, request: Request) -> None:
        def take(prepared: Prepared) -> None:
            self._prepared.append(prepared)
            self._note_prepared(rid)

        try:
            reply = await self._front.answer(request, rid, take)
        except Exception as error:
            reply = error_reply(error)
        finally:
            self._note_prepared(rid)
        self._answers.put_nowait(answer_line(index, reply.status_code, reply.content))

    def _note_prepared(self, rid: str) -> None:
        """The request is ready for the scheduler, or never will be."""
        self._unprepared.discard(rid)
        self._progress.set()

    # The answers go back

    async def answers(self) -> AsyncIterator[bytes]:
        """Lines of `wire.lines.answer_line` as requests finish, several at a time, and empty ones:
        the first at once, then as heartbeats. Ends with the last answer, but not before
        `end_programs` was told of every program that would go on."""
        self._starting = asyncio.create_task(self._start())
        yield b"\n"
        while self._unanswered or self._going_on:
            try:
                lines = [await asyncio.wait_for(self._answers.get(), HEARTBEAT_SECONDS)]
            except TimeoutError:
                if self._starting.done():
                    self._starting.result()
                yield b"\n"
                continue
            while not self._answers.empty():
                lines.append(self._answers.get_nowait())
            self._unanswered -= sum(map(bool, lines))
            yield b"".join(lines) or b"\n"

    def goes_on(self, program: int) -> bool:
        return program in self._going_on

    def end_programs(self, programs: dict[int, bool]) -> None:
        """See `registry.Registry.end_programs`."""
        known = {program: programs[program] for program in programs if self.goes_on(program)}
        if known:
            self._front.release(self._batch, known)
        self._going_on.difference_update(known)
        if not self._going_on:
            self._answers.put_nowait(b"")

    async def abandon(self) -> None:
        """Nobody waits for answers any more, if there are any: abort what has not finished, and
        release what is held. May be called again."""
        if self._open_batches.get(self._batch) is not self:
            return
        del self._open_batches[self._batch]
        self._share.give_back()
        if self._starting is not None:
            self._starting.cancel()
        self._prepared.clear()
        await _cancel(self._tasks)
        if self._starting is not None:
            self._front.release(self._batch)
        self._front.tidy()


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    left = iter([*tasks])
    while part := [*islice(left, SLICE)]:
        for task in part:
            task.cancel()
        await asyncio.wait(part)
