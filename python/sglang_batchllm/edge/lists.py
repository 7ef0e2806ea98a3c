"""Lists of prompts in one call: one batch for the scheduler, and no burden to other clients."""

from __future__ import annotations

import asyncio
import copy
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedGenerateReqInput,
    EmbeddingReqInput,
    GenerateReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.args import resolved
from sglang_batchllm.edge.garbage import Leftovers
from sglang_batchllm.edge.levelling import Levelling
from sglang_batchllm.edge.list_states import ListStates
from sglang_batchllm.edge.messages import AbortList
from sglang_batchllm.edge.packing import PackedList, end_of_list, packed
from sglang_batchllm.edge.parting import Sent, comes_in_parts, opening_of
from sglang_batchllm.edge.replicas import Replicas
from sglang_batchllm.edge.samples import nothing
from sglang_batchllm.policy.parts import Part
from sglang_batchllm.server.handover import SLICE, TEXT_SLICE, let_others_in

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import ReqState

    from sglang_batchllm.edge.seams.v0_5_17 import front as seam
else:
    seam = seams.load("front")

POLL_SECONDS = 0.2
"""How often the connection of a client that waits for a list is looked at."""


class ListIntake(ListStates):
    """SGLang's front end, with lists of any length.

    SGLang sends lists of token ids whole; here lists of plain text are too. Each of their requests
    passes the checks of single requests. Work on a list is cut into slices, between which other
    clients are served.
    """

    def init_running_status(self) -> None:
        super().init_running_status()
        self._aborts: list[AbortReq] = []
        self._parts: dict[str, Part] = {}  # about to be sent, by the id of the first request
        self._expects_many = False
        self._leftovers = Leftovers()
        self._freeing: asyncio.Task[None] | None = None  # nobody else keeps it
        arguments = resolved(self.server_args)
        self.replicas: Replicas | None = None
        self._levelling: Levelling | None = None
        if arguments.dp_size > 1:
            self.replicas = Replicas(
                arguments.dp_size, arguments.page_size, lambda rid: rid in self.rid_to_state
            )
            self._levelling = Levelling(
                self.replicas,
                super()._dispatch_to_scheduler,
                lambda: self.load_snapshot_reader.read_all(),
            )

    async def _expect_many(self) -> None:
        """The scheduler, too, sets aside what lives before the first of them come: the collector
        would take a second for it, every few thousand requests, in which nobody is served."""
        if not self._expects_many:
            self._expects_many = True
            await self.freeze_gc()

    # From the call to the scheduler

    def _should_use_batch_tokenization(
        self, batch_size: int, requests: GenerateReqInput | EmbeddingReqInput
    ) -> bool:
        """One message or many. Anything with images or embeddings is sent as SGLang does and
        gathered by the scheduler."""
        if super()._should_use_batch_tokenization(batch_size, requests):
            return True
        return (
            batch_size > 0
            and isinstance(requests.text, list)
            and self.is_generation
            and not requests.contains_mm_input()
        )

    async def _batch_tokenize_and_process(
        self, batch_size: int, obj: GenerateReqInput | EmbeddingReqInput
    ) -> list[Any]:
        """Texts are tokenized together; then each request goes SGLang's way for single ones, whose
        checks are more than those for lists."""
        if resolved(self.server_args).enable_tokenizer_batch_encode and self._batch_has_text(
            batch_size, obj
        ):
            self._validate_batch_tokenization_constraints(batch_size, obj)
        if self.replicas is None and comes_in_parts(obj, batch_size, self.model_config):
            prompts: Any = obj.text or obj.input_ids
            if first := opening_of(prompts):
                return await self._send_in_parts(batch_size, obj, first)
        tokenized: list[Any] = []
        for part in _slices([obj[index] for index in range(batch_size)]):
            tokenized += await self._tokenized(part)
            if len(tokenized) < batch_size:  # what is ready leaves at once
                await let_others_in()
        if self.replicas is not None:
            await self.replicas.spread(tokenized)
        return tokenized

    async def _tokenized(self, part: Sequence[Any]) -> list[Any]:
        self.make_states(part)
        texts = self.tokenize_together(part)
        tokenized = [await self._tokenize_one_request(request) for request in part]
        for request in texts:
            request.input_ids = None  # SGLang has them, too
        self.garbage.set_aside()
        return tokenized

    async def _send_in_parts(self, batch_size: int, obj: Any, first: list[int]) -> Sent:
        """Tokenize and send, `first` before the others. An error ends what has been sent."""
        opening = set(first)
        order = first + [index for index in range(batch_size) if index not in opening]
        name = obj[first[0]].rid
        sent: list[Any] = []
        states: dict[str, ReqState] = {}
        try:
            for requests in _slices(obj[index] for index in order):
                tokenized = await self._tokenized(requests)
                rids = [str(request.rid) for request in tokenized]
                self.check_aborted(rids)
                states.update(zip(rids, map(self.rid_to_state.__getitem__, rids), strict=True))
                sent += tokenized
                self._parts[rids[0]] = Part(name, last=len(sent) == batch_size)
                await self.send_list(tokenized)
                await let_others_in()
        except BaseException:
            self._dispatch_to_scheduler(AbortList(rids=[*states], awaited=set()))
            self._dispatch_to_scheduler(end_of_list(name))
            self.given_up(states.values())
            raise
        self.all_sent(states.values())
        self.rid_to_state.update(states)  # SGLang has forgotten those that are answered already
        places = dict(zip(order, sent, strict=True))
        return Sent(places[index] for index in range(batch_size))

    def sending_many(self) -> AbstractContextManager[None]:
        return self.garbage.made_for_long()

    def tokenize_together(self, requests: Sequence[Any]) -> list[Any]:
        """Give requests with a plain text the token ids of it; returns those requests. Texts that
        the tokenizer refuses stay as they are, since it does not say which it was."""
        having_text = [request for request in requests if self.characters(request)]
        if having_text:
            try:
                encoded = self._encode([request.text for request in having_text])
            except Exception:
                return []
            for request, ids in zip(having_text, encoded, strict=True):
                request.input_ids = ids
        return having_text

    def characters(self, request: Any) -> int:
        """Characters of a single text that have yet to be tokenized."""
        if (
            isinstance(request, GenerateReqInput)
            and isinstance(request.text, str)
            and request.input_ids is None
            and self.tokenizer is not None
            and not request.contains_mm_input()
        ):
            return len(request.text)
        return 0

    def _encode(self, texts: list[str]) -> list[array[int]]:
        """SGLang's own call, which suspends only for the single texts of its dynamic batching."""
        call = self._tokenize_texts(texts)
        try:
            call.send(None)
        except StopIteration as done:
            ids, _ = done.value
            return [array("q", one) for one in ids]
        call.close()
        raise RuntimeError("tokenization of a list was suspended")

    async def _tokenize_one_request(
        self, obj: GenerateReqInput | EmbeddingReqInput
    ) -> TokenizedGenerateReqInput | TokenizedEmbeddingReqInput:
        await self._expect_many()
        tokenized = await super()._tokenize_one_request(obj)
        if (
            isinstance(tokenized, TokenizedGenerateReqInput)
            and not tokenized.input_ids
            and tokenized.input_embeds is None
            and tokenized.session_params is None
        ):
            raise ValueError("input_ids cannot be empty.")
        return tokenized

    def due(self, tokenized: Any) -> list[Any]:
        ready = super().due(tokenized)
        if self.replicas is not None and len(ready) > 1:
            if self.gather:
                self.replicas.keep_together(ready)
            else:
                self.replicas.spread_now(ready)
        return ready

    # From the scheduler to the caller

    def _wait_one_response(self, obj: Any, request: Any = None) -> Any:
        if self.left_out(obj.rid):
            return nothing()
        state = self.rid_to_state[obj.rid]
        waiter = Waiter(self.stock_answers(obj, request, state), state, request)
        if state.finished:
            del self.rid_to_state[obj.rid]  # answered while its list was sent
        return waiter

    async def _collect_batch_responses(self, generators: Sequence[Waiter]) -> list[Any]:
        """A long list has no task, no timer and no look at the connection for each of its
        requests: SGLang collects those that have an answer."""
        if len(generators) < SLICE:
            return await super()._collect_batch_responses(generators)
        arrived: list[int] = []
        bell = asyncio.Event()
        with self.garbage.made_for_long():
            for index, waiter in enumerate(generators):
                waiter.ring(bell, arrived, index)
        outputs: list[Any] = [None] * len(generators)
        missing = len(generators)
        connection = _Connection(generators[0])
        try:
            while missing:
                await connection.wait(bell)
                bell.clear()
                now, arrived[:] = arrived[:SLICE], arrived[SLICE:]
                if arrived:
                    bell.set()
                answers = await super()._collect_batch_responses(
                    [generators[index] for index in now]
                )
                for index, answer in zip(now, answers, strict=True):
                    outputs[index] = answer
                missing -= len(now)
        finally:
            for waiter in generators:
                await waiter.aclose()
            self._leftovers.add(generators)
            self._freeing = asyncio.create_task(self._leftovers.free())
            if len(self.rid_to_state) < SLICE:
                self.garbage.sweep_if_due()
        return outputs

    # Aborts

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """The aborts of one turn of the event loop travel together, in order with all else."""
        if isinstance(obj, AbortReq) and not obj.abort_all:
            if not self._aborts:
                asyncio.get_running_loop().call_soon(self._send_aborts)
            self._aborts.append(obj)
        else:
            self._send_aborts()
            if isinstance(obj, AbortReq) and self._levelling is not None:
                self._levelling.let_go(None)
            for message in self._packed(obj):
                super()._dispatch_to_scheduler(message)

    async def _async_dispatch_to_scheduler(self, obj: Any) -> None:
        self._send_aborts()
        for message in self._packed(obj):
            await super()._async_dispatch_to_scheduler(message)

    def _packed(self, obj: Any) -> Iterator[Any]:
        if not isinstance(obj, BatchTokenizedGenerateReqInput):
            yield obj
        elif self.replicas is None:
            yield packed(obj, self._parts.pop(str(obj.batch[0].rid), None), gather=self.gather)
        else:
            for requests, shard, held in self.replicas.shards(obj.batch):
                if shard is None:
                    yield requests[0]
                    continue
                batch = copy.copy(obj)
                batch.batch = requests
                message = packed(batch, shard=shard, gather=self.gather)
                rids = [str(request.rid) for request in requests]
                if held and self._levelling is not None and isinstance(message, PackedList):
                    self._levelling.hold(message, rids)
                    continue
                if held and (told := self.replicas.move(rids, shard.replica)) is not None:
                    yield told
                yield message

    def _send_aborts(self) -> None:
        aborts, self._aborts = self._aborts, []
        if aborts and self._levelling is not None:
            self._levelling.let_go([abort.rid or "" for abort in aborts], whole=len(aborts) > 1)
        if len(aborts) == 1:
            super()._dispatch_to_scheduler(aborts[0])
        elif aborts:
            rids = [abort.rid or "" for abort in aborts]
            awaited = self.rid_to_state.keys() & rids
            super()._dispatch_to_scheduler(AbortList(rids=rids, awaited=awaited))


class Waiter:
    """The answers to one request: SGLang's generator of them, and what there is to know before it
    is asked."""

    __slots__ = ("_answers", "_asked", "request", "state")

    def __init__(self, answers: AsyncIterator[Any], state: ReqState, request: Any):
        self._answers = answers
        self._asked = False
        self.state = state
        self.request = request  # of HTTP, if any

    def __aiter__(self) -> Waiter:
        return self

    async def __anext__(self) -> Any:
        if self.request is None and not self.state.finished:
            await self.state.event.wait()  # SGLang would look every few seconds, for nothing
        self._asked = True
        return await self._answers.__anext__()

    async def aclose(self) -> None:
        if self._asked:  # the event loop would note down each that it closes
            await self._answers.aclose()  # type: ignore[attr-defined]

    def ring(self, bell: asyncio.Event, arrived: list[int], index: int) -> None:
        """From now on add `index` to `arrived` and set the bell when there is an answer."""

        def note() -> None:
            arrived.append(index)
            bell.set()

        event = _RingingEvent(note)
        if self.state.event.is_set():
            event.set()
        self.state.event = event


class _RingingEvent(asyncio.Event):
    def __init__(self, note: Callable[[], None]):
        super().__init__()
        self._note = note

    def set(self) -> None:
        if not self.is_set():
            self._note()
        super().set()


class _Connection:
    """Of the client that waits for a list."""

    def __init__(self, waiter: Waiter):
        self._request = waiter.request
        self._background = waiter.state.obj.background
        self._looked = time.monotonic()

    async def wait(self, event: asyncio.Event) -> None:
        """Raises ValueError, as SGLang does, when the client goes away meanwhile."""
        while True:
            if self._request is not None and time.monotonic() - self._looked > POLL_SECONDS:
                self._looked = time.monotonic()
                if not self._background and await self._request.is_disconnected():
                    raise ValueError("Request is disconnected from the client side (a list)")
            try:
                await asyncio.wait_for(event.wait(), POLL_SECONDS)
                return
            except TimeoutError:
                continue


def _slices(requests: Iterable[Any]) -> Iterator[list[Any]]:
    part: list[Any] = []
    size = 0
    for request in requests:
        part.append(request)
        size += len(request.text) if isinstance(request.text, str) else 0
        if len(part) >= SLICE or size >= TEXT_SLICE:
            yield part
            part, size = [], 0
    if part:
        yield part
