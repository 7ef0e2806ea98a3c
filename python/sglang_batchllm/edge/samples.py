"""Several samples of each prompt (``n``): all are planned together, and each prompt computed once.

SGLang first sends every prompt by itself, so that it is in the cache, and waits for one after the
other; then it sends the samples one by one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextvars import ContextVar
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_batchllm.edge.answers import SharedAnswers


class Samples:
    """What SGLang sends for one call: a request for each prompt, which is left out here, and then
    the samples, which go together.

    gather: they are those of a single prompt, to be planned with the samples of other calls.
    """

    def __init__(self, prompts: int, samples: int):
        """samples: of all prompts."""
        self.gather = prompts == 1
        self._first = prompts
        self._missing = samples
        self._ready: list[Any] = []
        self._left_out: set[str] = set()

    def due(self, tokenized: Any) -> list[Any]:
        """See `SendingManager.due`."""
        if self._first:
            self._first -= 1
            self._left_out.add(tokenized.rid)
            return []
        self._missing -= 1
        self._ready.append(tokenized)
        ready: list[Any] = []
        if not self._missing:
            ready, self._ready = self._ready, []
        return ready

    def leaves_out(self, rid: str) -> bool:
        """Whether the request was left out; asked once."""
        left_out = rid in self._left_out
        self._left_out.discard(rid)
        return left_out


_OPEN: ContextVar[Samples | None] = ContextVar("batchllm_samples", default=None)
"""Of the call that this task handles."""


class SampledLists(SharedAnswers):
    """SGLang's front end, which sends the samples of a call together."""

    async def _handle_batch_request(
        self, obj: Any, request: Any = None, *args: Any
    ) -> AsyncGenerator[Any, None]:
        samples = getattr(obj, "parallel_sample_num", 1)
        together = samples > 1 and isinstance(obj, GenerateReqInput) and not obj.contains_mm_input()
        _OPEN.set(Samples(obj.batch_size, obj.batch_size * samples) if together else None)
        try:
            async for answer in super()._handle_batch_request(obj, request, *args):
                yield answer
        finally:
            _OPEN.set(None)

    def due(self, tokenized: Any) -> list[Any]:
        samples = _OPEN.get()
        return [tokenized] if samples is None else samples.due(tokenized)

    @property
    def gather(self) -> bool:
        """Whether the list that is sent now is to be planned with what other calls send."""
        samples = _OPEN.get()
        return samples is not None and samples.gather

    def left_out(self, rid: str) -> bool:
        """Whether the request was never sent; it is forgotten then."""
        samples = _OPEN.get()
        if samples is None or not samples.leaves_out(rid):
            return False
        self.forget(rid)
        return True


async def nothing() -> AsyncIterator[None]:
    """The answer to a request that was left out."""
    yield None
