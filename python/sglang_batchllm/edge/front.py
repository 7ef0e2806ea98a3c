"""SGLang's front end, which hand-overs use, and its HTTP server, which gets their routes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_batchllm.edge import openai, seams
from sglang_batchllm.edge.lists import ListIntake
from sglang_batchllm.edge.messages import NameTurns, ReleaseTexts
from sglang_batchllm.server.handover import SLICE
from sglang_batchllm.server.registry import Registry
from sglang_batchllm.server.routes import add_routes
from sglang_batchllm.wire.lines import GENERATE, Reply

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import front as seam
else:
    seam = seams.load("front")

_BODY = TypeAdapter(GenerateReqInput)
"""What FastAPI checks the body of ``/generate`` with."""


class BatchLLMTokenizerManager(ListIntake):
    """Stands in for SGLang's TokenizerManager; without ``batchllm`` it makes one of SGLang's own.

    registry: its hand-overs.
    """

    def __new__(cls, server_args: ServerArgs, *args: Any, **kwargs: Any):
        if not getattr(server_args, "batchllm", False):
            stock = seam.SendingManager.__base__
            assert stock is not None
            return stock(server_args, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, server_args: ServerArgs, port_args: PortArgs, **options: Any):
        super().__init__(server_args, port_args, **options)
        self.taking: dict[str, Callable[[Any], None]] = {}  # by request id
        self.converting: set[str] = set()  # ids of chats in threads of SGLang's or ours
        self.registry = Registry(Front(self))

    def generate_request(self, obj: Any, request: Any = None) -> Any:
        rid = openai.claim(obj)
        if rid is not None:
            self.converting.discard(rid)
        return super().generate_request(obj, request)

    def due(self, tokenized: Any) -> list[Any]:
        rid = tokenized.rid
        take = self.taking.pop(rid, None)
        if take is not None:
            take(tokenized)
            return []
        later = self.registry.later_turn(rid)
        if later is not None:
            turns = {rid: ("later", later.program)}
            if self.replicas is not None:
                tokenized.routed_dp_rank = self.replicas.home(later.batch, later.program)
            replica = tokenized.routed_dp_rank
            if self.replicas is None or replica is not None:
                self._dispatch_to_scheduler(
                    NameTurns(batch=later.batch, turns=turns, replica=replica)
                )
        return super().due(tokenized)


class Front:
    """See `server.front.FrontEnd`."""

    def __init__(self, manager: BatchLLMTokenizerManager):
        self._manager: BatchLLMTokenizerManager = weakref.proxy(manager)

    def read(self, url: str, body: object) -> GenerateReqInput | openai.Asked:
        if url != GENERATE:
            return openai.read(url, body)
        request = openai.validated(_BODY, body)
        request.stream = False
        return request

    def untokenized(self, request: GenerateReqInput | openai.Asked) -> int:
        if isinstance(request, openai.Asked):
            return 0  # their templates come first
        params = request.sampling_params
        if isinstance(params, dict) and params.get("n", 1) != 1:
            return 0  # SGLang makes a list of it, and those take no arrays
        return self._manager.characters(request)

    def tokenize(self, requests: Sequence[GenerateReqInput]) -> None:
        for request in self._manager.tokenize_together(requests):
            request.text = None  # they take a quarter of the text's memory, or less

    async def answer(
        self,
        request: GenerateReqInput | openai.Asked,
        rid: str,
        take: Callable[[Any], None],
    ) -> Reply:
        manager = self._manager
        manager.taking[rid] = take
        try:
            if isinstance(request, openai.Asked):
                manager.converting.add(rid)
                return await request.answer(rid)
            request.rid = rid
            *_, result = [each async for each in manager.generate_request(request)]
            return Reply(200, _essence(result))
        finally:
            manager.taking.pop(rid, None)
            manager.converting.discard(rid)

    async def send(
        self,
        batch: str,
        requests: Sequence[TokenizedGenerateReqInput],
        turns: dict[str, tuple[str, int]],
        yields: bool,
    ) -> None:
        manager = self._manager
        replicas = manager.replicas
        told: Iterable[NameTurns] = [NameTurns(batch=batch, turns=turns, yields=yields)]
        if replicas is not None:
            await replicas.spread(requests)
            told = replicas.turns(batch, turns, yields, requests)
        for message in told:
            manager._dispatch_to_scheduler(message)
        await manager.send_list([*requests])
        for request in requests:
            request.input_ids = None  # SGLang keeps the request until it is answered

    def release(self, batch: str, programs: dict[int, bool] | None = None) -> None:
        if programs is None and self._manager.replicas is not None:
            self._manager.replicas.forget(batch)
        self._manager._dispatch_to_scheduler(ReleaseTexts(batch=batch, programs=programs))

    def is_preparing(self) -> bool:
        return bool(self._manager.converting)

    def settle(self) -> None:
        self._manager.garbage.set_aside()

    def tidy(self) -> None:
        if len(self._manager.rid_to_state) < SLICE:
            self._manager.garbage.sweep_if_due()

    async def internal_states(self) -> list[dict[str, Any]]:
        return await self._manager.get_internal_state()


def _essence(result: Any) -> Any:
    """What SGLang's client reads of a result; an engine without a tokenizer gives ids alone."""
    if isinstance(result, list):
        return [_essence(one) for one in result]
    essence = {"text": result.get("text"), "meta_info": result["meta_info"]}
    return essence if "text" in result else essence | {"output_ids": result["output_ids"]}


def add_batchllm_routes() -> None:
    """To SGLang's HTTP server, before it is set up."""
    from sglang.srt.entrypoints import http_server

    def registry() -> Registry:
        manager = http_server.get_global_state().tokenizer_manager
        assert isinstance(manager, BatchLLMTokenizerManager)
        return manager.registry

    add_routes(http_server.app, registry)
