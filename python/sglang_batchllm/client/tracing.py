"""Runs a program without the model, up to its first answers, to learn what it asks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import (
    SglCommitLazy,
    SglExpr,
    SglExprList,
    SglFunction,
    SglGen,
    SglImage,
    SglSamplingParams,
    SglSelect,
    SglVideo,
)

from sglang_batchllm.client.exchange import listening
from sglang_batchllm.wire.lines import Reply, encode

_tracing: ContextVar[bool] = ContextVar("batchllm_tracing", default=False)


class AnswerNeeded(BaseException):
    """The program cannot go on without the model. No Exception: programs may catch those."""


class Trace:
    """The requests that a program sends before it reads an answer.

    requests: each the JSON body of a ``POST /generate``. digests: one for each of them.
    cached: digests of the texts that SGLang would cache before a fork; a plan needs no such call.
    more: whether the program may send more requests after the answers to these.
    """

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.digests: list[bytes] = []
        self.cached: list[bytes] = []
        self.more = False

    def answer(self, body: dict[str, Any]) -> Reply | None:
        """See `exchange.Listener`: takes note of the request instead of sending it."""
        if body["sampling_params"].get("n", 1) == 1:  # others are not planned as a list by SGLang
            self.requests.append(encode(body))
            self.digests.append(digest_of(self.requests[-1]))
        raise AnswerNeeded

    def is_cached(self, text: str) -> bool:
        self.cached.append(digest_of(text.encode()))
        return True


def digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def trace_program(
    program: SglFunction,
    backend: BaseBackend,
    arguments: Mapping[str, Any],
    sampling: SglSamplingParams,
) -> Trace:
    """Run `program` until it needs the model, in this thread, and return what it asked.

    The trace is empty when nothing can be known: the program needs the model or an image at once,
    or raises. Python code before the first answer runs, and will run again in the real run; lists
    and dicts among the arguments are copied so that it finds them as they were.
    """
    trace = Trace()
    token = _tracing.set(True)
    try:
        own = {
            name: value.copy() if isinstance(value, list | dict | set) else value
            for name, value in arguments.items()
        }
        executor = TracingExecutor(trace, backend, own, sampling, program.num_api_spec_tokens)
        program.func(ProgramState(executor), **(own | program.bind_arguments))
    except AnswerNeeded:
        trace.more = True
    except BaseException:  # the real run will raise it where it belongs
        return Trace()
    finally:
        _tracing.reset(token)
    return trace


def stop_tracing(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wraps SGLang's `run_program`: a program that runs another one needs the model."""
    if _tracing.get():
        raise AnswerNeeded
    return run(*args, **kwargs)


class TracingExecutor(StreamExecutor):
    """SGLang's interpreter without threads, which stops where it would wait for the model.

    What a program adds after that is dropped, and reading the answer raises AnswerNeeded; other
    forks go on.
    """

    def __init__(
        self,
        trace: Trace,
        backend: BaseBackend,
        arguments: dict[str, Any],
        sampling: SglSamplingParams,
        num_api_spec_tokens: int | None,
    ):
        super().__init__(
            backend,
            arguments,
            sampling,
            chat_template=None,
            stream=False,
            num_api_spec_tokens=num_api_spec_tokens,
            use_thread=False,
        )
        self._trace = trace
        self._waiting = False

    def submit(self, expr: SglExpr) -> None:
        if self._waiting:
            self._init_var_event(expr)
            self._trace.more |= _num_requests(expr) > 0
            return
        before = len(self._trace.requests)
        try:
            with listening(self._trace):
                super().submit(expr)
        except AnswerNeeded:
            self._waiting = True
            self._trace.more |= _num_requests(expr) > len(self._trace.requests) - before

    def fork(
        self, size: int = 1, position_ids_offset: list[int] | None = None
    ) -> list[StreamExecutor]:
        if size > 1 and self.text_:
            self.submit(SglCommitLazy())
        self.sync()
        children: list[StreamExecutor] = []
        for _ in range(int(size)):
            child = copy.copy(self)
            child.variables = dict(self.variables)
            child.variable_event = {}
            child.meta_info = {}
            child.messages_ = list(self.messages_)
            child.fork_start_text_pos = len(self.text_)
            children.append(child)
        return children

    def sync(self) -> None:
        if self._waiting:
            raise AnswerNeeded

    def get_var(self, name: str) -> Any:
        self._check_known(name)
        return super().get_var(name)

    def get_meta_info(self, name: str, timeout: float | None = None) -> Any:
        self._check_known(name)
        return super().get_meta_info(name, timeout)

    def _check_known(self, name: str) -> None:
        event = self.variable_event.get(name)
        known = name in self.variables if event is None else event.is_set()
        if not known and (self._waiting or event is not None):
            raise AnswerNeeded

    def _execute_select(self, expr: SglSelect) -> None:
        self._trace.more = True  # only the prompt can be handed over, the choices come after it
        super()._execute_select(expr)

    def _execute_image(self, expr: SglImage) -> None:
        self._trace.more = True
        raise AnswerNeeded

    def _execute_video(self, expr: SglVideo) -> None:
        self._trace.more = True
        raise AnswerNeeded

    def _resolve_sampling_params(self, sampling_params: SglSamplingParams) -> SglSamplingParams:
        if isinstance(sampling_params.stop, list):  # SGLang may extend it in place
            sampling_params = dataclasses.replace(sampling_params, stop=[*sampling_params.stop])
        return super()._resolve_sampling_params(sampling_params)


def _num_requests(expr: SglExpr) -> int:
    if isinstance(expr, SglExprList):
        return sum(map(_num_requests, expr.expr_list))
    return isinstance(expr, SglGen | SglSelect)
