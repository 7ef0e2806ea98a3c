"""Texts that programs will continue, held in the cache between their turns."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Protocol

from sglang.srt.managers.io_struct import BaseReq

from sglang_batchllm.request_ids import RequestId

HOLD_SECONDS = 1.0
"""For how long a text is held although requests wait for the memory. Programs that take longer
between their turns would otherwise leave the others nothing to run in."""


class ReleaseTexts(BaseReq, kw_only=True):
    """From a tokenizer process to the scheduler: programs of a batch have ended, or all have."""

    batch: str
    programs: list[int] | None = None


class TextStore(Protocol):
    """Where texts are cached: SGLang's radix tree, see `cache.PinnedGroupCache`."""

    def lock(self, tokens: array, namespace: str | None) -> tuple[Any, int]:
        """Lock what is cached of the text; returns a handle and the tokens nobody else locks."""
        ...

    def unlock(self, handle: Any) -> None: ...


@dataclass(slots=True, eq=False)
class _Text:
    handle: Any
    tokens: int
    since: float


class HeldTexts:
    """What the programs of each batch hold, from a turn's end to the program's.

    tokens: KV tokens that nobody else held when they were locked here.
    """

    def __init__(self, store: TextStore):
        self._store = store
        self._batches: dict[str, dict[int, list[_Text]]] = {}
        self._texts: dict[_Text, None] = {}  # oldest first
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._texts)

    def expect(self, batch: str) -> None:
        """A batch begins of which programs may continue texts. Nothing is held for others, so
        what ends after its client is gone holds nothing."""
        self._batches.setdefault(batch, {})

    def hold(self, asked: RequestId, tokens: array, namespace: str | None) -> None:
        """The request has ended, and its KV is cached: hold the text if its program goes on."""
        if asked.batch not in self._batches:
            return
        handle, own = self._store.lock(tokens, namespace)
        text = _Text(handle, own, time.monotonic())
        self._batches[asked.batch].setdefault(asked.program, []).append(text)
        self._texts[text] = None
        self.tokens += own

    def release(self, batch: str, programs: Iterable[int] | None) -> None:
        """These programs have ended; None: all have, and no more texts come."""
        held = self._batches.get(batch, {})
        for program in list(held) if programs is None else programs:
            for text in held.pop(program, ()):
                self._release(text)
        if programs is None:
            self._batches.pop(batch, None)

    def num_expired(self) -> int:
        """Texts that have been held for `HOLD_SECONDS`."""
        before = time.monotonic() - HOLD_SECONDS
        return sum(1 for _ in takewhile(lambda text: text.since < before, self._texts))

    def release_oldest(self, number: int = 1) -> None:
        """Others need the memory: leave the oldest texts to the cache's eviction."""
        for text in [*islice(self._texts, number)]:
            self._release(text)

    def _release(self, text: _Text) -> None:
        if text in self._texts:
            del self._texts[text]
            self._store.unlock(text.handle)
            self.tokens -= text.tokens
