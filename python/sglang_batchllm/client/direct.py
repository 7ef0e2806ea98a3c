"""Runs a program in one thread."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from sglang.lang import interpreter
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglExpr, SglFunction, SglSamplingParams


def run_directly(
    program: SglFunction,
    backend: BaseBackend,
    arguments: Mapping[str, Any],
    sampling: SglSamplingParams,
) -> ProgramState:
    """As SGLang's `run_program` with ``sync``, except that the state has no thread of its own: it
    takes most of the time of a program whose answers are there. Forks have theirs."""
    own = {**arguments, **program.bind_arguments}
    executor = DirectExecutor(
        backend,
        own,
        sampling,
        chat_template=None,
        stream=False,
        num_api_spec_tokens=program.num_api_spec_tokens,
        use_thread=False,
    )
    state = ProgramState(executor)
    interpreter.run_internal(state, program, (), own, sync=True)
    return state


def still_asks(state: ProgramState) -> bool:
    """Whether a fork of a program that `run_directly` has run is not done: nobody joined it."""
    executor = state.stream_executor
    assert isinstance(executor, DirectExecutor)
    return any(fork.queue.unfinished_tasks for fork in executor.forks)


class DirectExecutor(StreamExecutor):
    """SGLang's interpreter without its thread. An error ends up where that thread puts it: in
    `error()`, and variables that will never come are not waited for.

    forks: those that it has made; each lives at least until it is done.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.forks: WeakSet[StreamExecutor] = WeakSet()

    def fork(
        self, size: int = 1, position_ids_offset: list[int] | None = None
    ) -> list[StreamExecutor]:
        forks = super().fork(size, position_ids_offset)
        self.forks.update(forks)
        return forks

    def submit(self, expr: SglExpr) -> None:
        if self.error_ is None:
            try:
                super().submit(expr)
                return
            except Exception as error:
                warnings.warn(f"a request of a program failed: {error!r}", stacklevel=2)
                self.error_ = error
        else:
            self._init_var_event(expr)
        for event in self.variable_event.values():
            event.set()
