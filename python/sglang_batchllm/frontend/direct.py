"""Runs a program in one thread."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

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


class DirectExecutor(StreamExecutor):
    """SGLang's interpreter without its thread. An error ends up where that thread puts it: in
    `error()`, and variables that will never come are not waited for."""

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
