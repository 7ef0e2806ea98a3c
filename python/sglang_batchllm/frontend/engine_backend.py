"""An in-process engine as a backend for `sgl.function` programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import fastapi
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.utils.json_response import dumps_json

from sglang_batchllm.frontend.exchange import Reply, register_in_process
from sglang_batchllm.frontend.handover import (
    REQUEST_ERRORS,
    HandOver,
    end_programs,
    error_reply,
)
from sglang_batchllm.frontend.run_route import RUN_PATH, limits

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
            except REQUEST_ERRORS as error:
                return error_reply(error)

    def hand_over(self, batch: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """See `exchange.InProcessServer`."""
        handover = HandOver(self._manager, batch)
        with self._running_loop():
            for chunk in chunks:
                self._call(handover.add(chunk.splitlines()))
            self._call(handover.start())
            answers = handover.answers()
            try:
                while chunk := self._call(_next_or_nothing(answers)):
                    yield from chunk.splitlines()
            finally:
                self._call(handover.abandon())

    def end_programs(self, batch: str, programs: dict[int, bool]) -> None:
        """See `exchange.InProcessServer`."""
        with self._running_loop():
            self._engine.loop.call_soon_threadsafe(end_programs, self._manager, batch, programs)

    @property
    def _manager(self) -> TokenizerManager:
        manager = self._engine.tokenizer_manager
        assert manager is not None, "the engine has no tokenizer process"
        return manager

    async def _respond(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/generate":
            request = GenerateReqInput(**body)
            return await anext(aiter(self._manager.generate_request(request)))
        if path in ("/get_model_info", "/model_info"):
            return {"model_path": self._manager.model_path}
        if path == "/flush_cache":
            return (await self._manager.flush_cache()).success
        if path == RUN_PATH and getattr(self._engine.server_args, "batchllm", False):
            return await limits(self._manager)
        raise fastapi.HTTPException(404, f"an engine in this process has no {path}")

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
        """Keeps the engine's event loop running in a thread while anyone is within."""
        loop = self._engine.loop
        with self._lock:
            if self._loop_users == 0:
                self._loop_thread = threading.Thread(target=loop.run_forever, daemon=True)
                self._loop_thread.start()
            self._loop_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._loop_users -= 1
                if self._loop_users == 0:
                    loop.call_soon_threadsafe(loop.stop)
                    self._loop_thread.join()


async def _next_or_nothing(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)
