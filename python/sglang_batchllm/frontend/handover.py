"""The server's side of a hand-over: requests that come together, and are planned together."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import fastapi
import orjson
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput

from sglang_batchllm.frontend.exchange import Reply, answer_line
from sglang_batchllm.request_ids import RequestId, parse_request_id
from sglang_batchllm.runtime.held import ReleaseTexts

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

HEARTBEAT_SECONDS = 1.0
"""An empty line is sent when nothing else was for this long, so that each side notices when the
other is gone."""

_TEXT_SLICE = 1 << 19
"""Characters to tokenize before other work of the process gets its turn."""

_START_SLICE = 256
"""Requests to start before other work of the process gets its turn."""

REQUEST_ERRORS = (ValueError, TypeError, fastapi.HTTPException)
"""What SGLang raises for a request that it can't run."""

_open: dict[str, HandOver] = {}  # by batch
_frozen: WeakSet[TokenizerManager] = WeakSet()


class HandOver:
    """One list of requests: each is handled by SGLang like a request of its own, with its own
    errors, but they reach the scheduler in one message, which plans them together."""

    def __init__(self, manager: TokenizerManager, batch: str):
        """Raises ValueError for a batch that is none of `request_ids.new_batch_id`."""
        if parse_request_id(str(RequestId("once", batch, 0, 0))) is None or batch in _open:
            raise ValueError(f"{batch!r} is not the id of a new batch")
        self._manager = manager
        self._batch = batch
        self._bodies: list[dict[str, Any]] = []
        self._programs: list[int] = []  # of these bodies
        self._going_on: set[int] = set()  # programs that will send more
        self._untokenized: list[dict[str, Any]] = []  # of these bodies
        self._untokenized_size = 0  # characters
        self._unprepared: set[str] = set()  # ids of requests that SGLang has yet to tokenize
        self._tokenized: list[Any] = []  # TokenizedGenerateReqInput
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent = asyncio.Event()
        self._unanswered = 0
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def add(self, lines: Iterable[bytes]) -> None:
        """Take requests, one of `exchange.request_line` each, and tokenize their texts.

        Raises ValueError, KeyError or TypeError for lines of any other kind.
        """
        for line in lines:
            entry = orjson.loads(line)
            body: dict[str, Any] = entry["request"]
            program = int(entry["program"])
            if entry["more"]:
                self._going_on.add(program)
            self._bodies.append(body)
            self._programs.append(program)
            if body.get("text") and self._manager.tokenizer is not None:
                self._untokenized.append(body)
                self._untokenized_size += len(body["text"])
            if self._untokenized_size >= _TEXT_SLICE:
                await self._tokenize()

    async def _tokenize(self) -> None:
        bodies, self._untokenized = self._untokenized, []
        self._untokenized_size = 0
        token_ids, _ = await self._manager._tokenize_texts([body.pop("text") for body in bodies])
        for body, ids in zip(bodies, token_ids, strict=True):
            body["input_ids"] = array("q", cast("list[int]", ids))  # a tenth of a list's memory
        await asyncio.sleep(0)

    async def start(self) -> None:
        """No more requests come: hand all of them to the scheduler."""
        if self._untokenized:
            await self._tokenize()
        if self._manager not in _frozen:
            # Thousands of new objects set off garbage collections, each of which would look at
            # all that SGLang has loaded: a third of the time until the first answer.
            _frozen.add(self._manager)
            await self._manager.freeze_gc()
        _open[self._batch] = self
        bodies, self._bodies = self._bodies, []
        self._unanswered = len(bodies)
        rids: list[str] = []
        for index, program in enumerate(self._programs):
            turn = "first" if program in self._going_on else "once"
            rids.append(str(RequestId(turn, self._batch, program, index)))
        self._unprepared = set(rids)
        for index, (rid, body) in enumerate(zip(rids, bodies, strict=True)):
            task = asyncio.create_task(self._answer(index, rid, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if index % _START_SLICE == 0:
                await asyncio.sleep(0)

    async def _answer(self, index: int, rid: str, body: dict[str, Any]) -> None:
        status: int = 200
        content: dict[str, Any] = {}
        try:
            async for result in self._manager.generate_request(GenerateReqInput(rid=rid, **body)):
                assert isinstance(result, dict)
                content = {"text": result.get("text"), "meta_info": result["meta_info"]}
        except REQUEST_ERRORS as error:
            reply = error_reply(error)
            status, content = reply.status_code, reply.content
        finally:
            self._prepared(rid)
        self._answers.put_nowait(answer_line(index, status, content))

    def _prepared(self, rid: str) -> None:
        """The request is ready for the scheduler, or never will be."""
        self._unprepared.discard(rid)
        if not self._unprepared:
            tokenized, self._tokenized = self._tokenized, []
            if tokenized:
                self._manager._send_batch_request(tokenized)
            self._sent.set()

    async def answers(self) -> AsyncIterator[bytes]:
        """Lines of `exchange.answer_line` as requests finish, several at a time, and empty ones:
        the first when the scheduler has all requests, then as heartbeats. Ends with the last
        answer, but not before `end_programs` was told of every program that would go on."""
        if self._unanswered:
            await self._sent.wait()
        yield b"\n"
        while self._unanswered or self._going_on:
            try:
                lines = [await asyncio.wait_for(self._answers.get(), HEARTBEAT_SECONDS)]
            except TimeoutError:
                yield b"\n"
                continue
            while not self._answers.empty():
                lines.append(self._answers.get_nowait())
            self._unanswered -= sum(map(bool, lines))
            yield b"".join(lines) or b"\n"

    def end_programs(self, programs: Iterable[int]) -> None:
        self._going_on.difference_update(programs)
        if not self._going_on:
            self._answers.put_nowait(b"")

    async def abandon(self) -> None:
        """Nobody waits for answers any more: abort what has not finished, release what is held."""
        _open.pop(self._batch, None)
        if self._unprepared:
            self._tokenized.clear()
            for task in self._tasks:
                task.cancel()
            return
        if self._tasks:  # the scheduler's answers end them
            for turn in ("once", "first"):
                prefix = RequestId.prefix(turn, self._batch)
                self._manager._dispatch_to_scheduler(AbortReq(rid=prefix))
        self._manager._dispatch_to_scheduler(ReleaseTexts(batch=self._batch))


def error_reply(error: Exception) -> Reply:
    """How SGLang's HTTP server answers one of `REQUEST_ERRORS`."""
    if isinstance(error, fastapi.HTTPException):
        status = error.status_code
        return Reply(status, {"object": "error", "message": error.detail, "type": str(status)})
    return Reply(getattr(error, "status_code", 400), {"error": {"message": str(error)}})


def end_programs(manager: TokenizerManager, batch: str, programs: dict[int, bool]) -> None:
    """These programs of a batch send no more requests: what is held for them may go. programs: see
    `ReleaseTexts`."""
    manager._dispatch_to_scheduler(ReleaseTexts(batch=batch, programs=programs))
    handover = _open.get(batch)
    if handover is not None:  # else its connection has been closed
        handover.end_programs(programs)


def gather(
    send_one: Callable[..., None],
    manager: TokenizerManager,
    tokenized: TokenizedGenerateReqInput,
) -> None:
    """Wraps TokenizerManager._send_one_request: requests of a hand-over leave together."""
    rid = tokenized.rid or ""
    asked = parse_request_id(rid)
    handover = None if asked is None else _open.get(asked.batch)
    if handover is None or rid not in handover._unprepared:
        send_one(manager, tokenized)
    else:
        handover._tokenized.append(tokenized)
        handover._prepared(rid)
