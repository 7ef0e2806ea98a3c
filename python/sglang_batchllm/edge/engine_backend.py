"""An in-process engine as a backend for `sgl.function` programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import HTTPException
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.utils.json_response import dumps_json

from sglang_batchllm.client.exchange import register_in_process
from sglang_batchllm.edge.front import BatchLLMTokenizerManager
from sglang_batchllm.server.errors import RefusedError, error_reply
from sglang_batchllm.server.registry import Registry
from sglang_batchllm.server.routes import limits
from sglang_batchllm.wire.lines import Reply
from sglang_batchllm.wire.paths import RUN_PATH

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

T = TypeVar("T")


class EngineBackend(RuntimeEndpoint):
    """SGLang's own backend, with a `sgl.Engine` instead of a server at the other end.

    Use the engine through this backend only while programs run: their threads share its event
    loop, which `Engine.generate` needs for itself.
    """

    def __init__(self, engine: Engine, chat_template_name: str | None = None):
        self._engine = engine
        self._lock = threading.Lock()
        self._loop_users = 0
        self._loop_thread = threading.Thread()
        super().__init__(register_in_process(self), chat_template_name=chat_template_name)

    def get_server_info(self) -> dict[str, Any]:
        return self._engine.get_server_info()

    def request(self, path: str, body: dict[str, Any] | None, stream: bool) -> Reply:
        """See `exchange.InProcessServer`; raises nothing that SGLang's server would answer."""
        with self._running_loop():
            if path == "/generate" and stream:
                return Reply(200, self._stream(body or {}))
            try:
                return Reply(200, self._call(self._respond(path, body or {})))
            except Exception as error:
                return error_reply(error)

    def hand_over(self, batch: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """See `exchange.InProcessServer`; raises RuntimeError for what a server would refuse."""
        with self._running_loop():
            try:
                handover = self._registry.begin(batch)
            except RefusedError as refused:
                raise RuntimeError(refused.reply.text) from None
            try:
                for chunk in chunks:
                    self._call(handover.add(chunk))
                self._call(handover.finish())
                answers = handover.answers()
                while lines := self._call(_next_or_nothing(answers)):
                    yield from lines.splitlines()
            except RefusedError as refused:
                raise RuntimeError(refused.reply.text) from None
            finally:
                self._call(handover.abandon())

    def end_programs(self, batch: str, programs: dict[int, bool]) -> None:
        """See `exchange.InProcessServer`."""
        with self._running_loop():
            self._call(_end_programs(self._registry, batch, programs))

    @property
    def _manager(self) -> TokenizerManager:
        manager = self._engine.tokenizer_manager
        assert manager is not None, "the engine has no tokenizer process"
        return manager

    @property
    def _registry(self) -> Registry:
        manager = self._manager
        if not isinstance(manager, BatchLLMTokenizerManager):
            raise HTTPException(404, "the engine runs without batchllm=True")
        return manager.registry

    async def _respond(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            request = GenerateReqInput(**body)
            return await anext(aiter(self._manager.generate_request(request)))
        if path in ("/get_model_info", "/model_info"):
            return {"model_path": self._manager.model_path}
        if path == "/flush_cache":
            return (await self._manager.flush_cache()).success
        if path == RUN_PATH:
            return await limits(self._registry.front)
        raise HTTPException(404, f"an engine in this process has no {path}")

    def _stream(self, body: dict[str, Any]) -> Iterator[bytes]:
        with self._running_loop():
            results = self._manager.generate_request(GenerateReqInput(**body))
            while result := self._call(_next_or_nothing(results)):
                yield b"data: " + dumps_json(result)
        yield b"data: [DONE]"

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._engine.loop).result()

    @contextmanager
    def _running_loop(self) -> Iterator[None]:
        """Keeps the engine's event loop running in a thread while anyone is within, unless others
        run it: an engine that was made in a running loop has that one."""
        loop = self._engine.loop
        with self._lock:
            mine = self._loop_users > 0 or not loop.is_running()
            if mine and self._loop_users == 0:
                self._loop_thread = threading.Thread(target=loop.run_forever, daemon=True)
                self._loop_thread.start()
            self._loop_users += mine
        try:
            yield
        finally:
            with self._lock:
                self._loop_users -= mine
                if mine and self._loop_users == 0:
                    loop.call_soon_threadsafe(loop.stop)
                    self._loop_thread.join()


async def _next_or_nothing(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


async def _end_programs(registry: Registry, batch: str, programs: dict[int, bool]) -> None:
    """In the engine's loop. A batch that is not open any more holds nothing."""
    with suppress(RefusedError):
        registry.end_programs(batch, programs)
