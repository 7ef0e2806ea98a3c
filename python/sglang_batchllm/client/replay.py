"""Runs of programs that were traced: what they ask was handed over and answered before."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from sglang.lang.interpreter import ProgramState
from sglang.lang.ir import SglFunction

from sglang_batchllm.client.direct import still_asks
from sglang_batchllm.client.tracing import Trace, digest_of
from sglang_batchllm.wire.lines import Reply, encode
from sglang_batchllm.wire.request_ids import RequestId

logger = logging.getLogger(__name__)


class Replay:
    """Gives a program the answers to the requests of its trace, each once, and names its later
    requests so that their texts are held until it ends.

    went_on: whether it has asked for more than was handed over.
    """

    def __init__(self, trace: Trace, answers: Sequence[Reply | None], batch: str, program: int):
        """batch, program: see `request_ids.RequestId`."""
        self._batch = batch
        self._program = program
        self._numbers = itertools.count()
        self.went_on = False
        self._cached = trace.cached
        self._replies: dict[bytes, deque[Reply]] = {}
        self._used = False
        for digest, reply in zip(trace.digests, answers, strict=True):
            assert reply is not None
            self._replies.setdefault(digest, deque()).append(reply)

    def answer(self, body: dict[str, Any]) -> Reply | None:
        """See `exchange.Listener`; None for a request that is not as it was traced."""
        replies = self._replies.get(digest_of(encode(body)))
        try:
            if replies:
                reply = replies.popleft()
                self._used = True
                return reply
        except IndexError:  # another fork took the last one
            pass
        self.went_on = True
        if isinstance(body.get("text"), str) and body["sampling_params"].get("n", 1) == 1:
            number = next(self._numbers)
            body["rid"] = str(RequestId("later", self._batch, self._program, number))
        return None

    def is_cached(self, text: str) -> bool:
        return digest_of(text.encode()) in self._cached

    def strayed(self, result: ProgramState | BaseException) -> bool:
        """Whether the program, which has ended with this result, did otherwise than in its trace:
        it left answers and asked something else, or raised before it asked anything."""
        if not any(self._replies.values()):
            return False
        if isinstance(result, BaseException):
            return not self._used
        return self.went_on and not still_asks(result)


FEW = 8
SHARE = 0.25
"""Of the programs of a batch that have run: once at least `FEW` and this part of them have
strayed, no more are handed over."""

_wayward: WeakSet[SglFunction] = WeakSet()


def strays(program: SglFunction) -> bool:
    """Whether so many of a batch of this program have strayed that it is not worth tracing."""
    return program in _wayward


class Strays:
    """Counts those of one batch. many: whether to stop handing over."""

    def __init__(self, program: SglFunction):
        self._program = program
        self._ran = 0
        self._strayed = 0
        self.many = False

    def note(self, strayed: bool) -> None:
        """One more program has run. Warns of the first that strayed; not to be called by two
        threads at a time."""
        self._ran += 1
        if not strayed:
            return
        self._strayed += 1
        name = self._program.func.__qualname__
        if self._strayed == 1:
            logger.warning(
                "The program %s asked the model something else than in its trace, so its answer "
                "was computed twice. Up to its first answer a program has to do the same each time "
                "that it runs: draw random numbers, and read clocks, counters, queues and "
                "iterators, before run_batch, and pass what they give as arguments. If more than a "
                "few do this, the rest of the batch runs as it comes, and so do later batches of "
                "this program.",
                name,
            )
        if self._strayed >= FEW and self._strayed >= SHARE * self._ran and not self.many:
            self.many = True
            _wayward.add(self._program)
            logger.info(
                "Of %d programs %s that ran, %d strayed from their traces: the rest of the batch, "
                "and later ones, run as they come",
                self._ran,
                name,
                self._strayed,
            )
