"""Texts that programs will continue, held in the cache between their turns."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from sglang_batchllm.policy.requests import Turn
from sglang_batchllm.policy.store import Store

HOLD_SECONDS = 1.0
"""For how long a text is held although requests wait for the memory. Programs that take longer
between their turns would otherwise leave the others nothing to run in."""

ENOUGH_ENDED = 8
FEW = 0.1
"""A program that reads its answer may just end. Once `ENOUGH_ENDED` of a batch have ended, and no
more than this part of them went on, no further first turns are held."""


@dataclass(slots=True, eq=False)
class _Text:
    handle: Any
    tokens: int
    since: float


@dataclass(slots=True)
class _Programs:
    """Of one batch. programs: the texts of each that has not ended. ended, went_on: programs that
    have, and those of them that sent more than their first requests."""

    programs: dict[int, list[_Text]] = field(default_factory=dict)
    ended: int = 0
    went_on: int = 0


class HeldTexts:
    """What the programs of each batch hold, from a turn's end to the program's.

    tokens: KV tokens that nobody else held when they were locked here.
    """

    def __init__(self, store: Store):
        self._store = store
        self._batches: dict[str, _Programs] = {}
        self._texts: dict[_Text, None] = {}  # oldest first
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._texts)

    def expect(self, batch: str) -> None:
        """A batch begins of which programs may continue texts. Nothing is held for others, so
        what ends after its client is gone holds nothing."""
        self._batches.setdefault(batch, _Programs())

    def goes_on(self, batch: str) -> bool:
        """Whether a program of the batch is expected to continue the text of its first turn."""
        seen = self._batches.get(batch)
        if seen is None:
            return False
        return seen.ended < ENOUGH_ENDED or seen.went_on > FEW * seen.ended

    def hold(self, turn: Turn, tokens: array, namespace: str | None) -> None:
        """The request has ended, and its KV is cached: hold the text if its program goes on."""
        batch = self._batches.get(turn.batch)
        if batch is None or not (turn.kind == "later" or self.goes_on(turn.batch)):
            return
        handle, own = self._store.hold_text(tokens, namespace)
        text = _Text(handle, own, time.monotonic())
        batch.programs.setdefault(turn.program, []).append(text)
        self._texts[text] = None
        self.tokens += own

    def release(self, batch: str, programs: Mapping[int, bool] | None) -> None:
        """These programs have ended (each with whether it sent more than its first requests); after
        None no more texts come."""
        held = self._batches.get(batch)
        if held is None:
            return
        if programs is None:
            del self._batches[batch]
        else:
            held.ended += len(programs)
            held.went_on += sum(programs.values())
        for program in [*held.programs] if programs is None else programs:
            for text in held.programs.pop(program, ()):
                self._release(text)

    def clear(self) -> None:
        """The cache was flushed."""
        self._batches.clear()
        self._texts.clear()
        self.tokens = 0

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
            self._store.release_text(text.handle)
            self.tokens -= text.tokens
