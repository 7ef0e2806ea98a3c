"""Logprobs of shared prompt tokens, left by whoever computes them for all who ask.

A forward pass gives a *row* for each prompt position: the logprob of the token after it, the most
likely tokens there, and the logprobs of token ids that were asked for. All who share a prefix have
the same rows, except that the row of its last position tells of a token that is no longer shared.
The plan knows every token that follows, so of that row the logprobs of all of these are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_BYTES = 1 << 30
"""Of all rows that are kept at one time; what does not fit is computed again."""

_NEVER = np.iinfo(np.int64).max
_BYTES_PER_FOLLOWING = 100  # an entry of a dict, its key and its value


class Ask(NamedTuple):
    """Rows that somebody wants: from prompt position `start` on, each with the `top` most likely
    tokens and the logprobs of the token ids `ids`."""

    start: int
    top: int
    ids: tuple[int, ...]


class RowLists(NamedTuple):
    """Rows as SGLang has them: a logprob each, and a list each of logprobs or token ids."""

    values: Sequence[float]
    top_values: Sequence[Sequence[float]]
    top_ids: Sequence[Sequence[int]]
    id_values: Sequence[Sequence[float]]


def _places(ids: Sequence[int], among: Sequence[int]) -> list[int]:
    return [among.index(token) for token in ids]


class Asks:
    """What the requests of one batch ask, by their places in the plan's order."""

    def __init__(self, asks: Sequence[Ask | None]):
        self._start = np.array([ask.start if ask else _NEVER for ask in asks])
        self._top = np.array([ask.top if ask else 0 for ask in asks])
        numbers: dict[tuple[int, ...], int] = {(): 0}
        self._ids = np.array(
            [numbers.setdefault(ask.ids, len(numbers)) if ask else 0 for ask in asks]
        )
        self._sets = list(numbers)

    def earliest(self, first: int, stop: int) -> int:
        """The least position that any of the places [first, stop) asks for; huge if none does."""
        return int(self._start[first:stop].min())

    def union(self, first: int, stop: int) -> Ask:
        """What serves all of the places [first, stop)."""
        numbers = np.unique(self._ids[first:stop]).tolist()
        ids = sorted({token for number in numbers for token in self._sets[number]})
        top = int(self._top[first:stop].max())
        return Ask(self.earliest(first, stop), top, tuple(ids))


class Rows:
    """The rows of prompt positions [start, stop), which end with a shared node.

    values: float32[n], the logprob of each next token; top_values, top_ids: float32 and int32
    [n, top], the most likely first; id_values: float32[n, len(ids)]. following: the logprob of each
    token that comes after the last position, where that is not the same for all; else None. They
    are filled as forward passes end; whoever reads them runs in a later pass.
    """

    def __init__(self, start: int, stop: int, ask: Ask, following: Sequence[int] | None):
        self.start, self.stop, self.ids = start, stop, ask.ids
        self.following = None if following is None else dict.fromkeys(following, float("nan"))
        count = stop - start
        self.values = np.full(count, np.nan, np.float32)
        self.top_values = np.full((count, ask.top), np.nan, np.float32)
        self.top_ids = np.zeros((count, ask.top), np.int32)
        self.id_values = np.full((count, len(ask.ids)), np.nan, np.float32)

    def fill(self, start: int, part: RowLists, ids: Sequence[int]) -> None:
        """A pass has computed rows from position `start` on, with at least `top` tokens and, among
        others, all of `ids`."""
        low, high = max(start, self.start), min(start + len(part.values), self.stop)
        if low >= high:
            return
        here, there = slice(low - self.start, high - self.start), slice(low - start, high - start)
        self.values[here] = part.values[there]
        top = self.top_ids.shape[1]
        if top:
            self.top_values[here] = [row[:top] for row in part.top_values[there]]
            self.top_ids[here] = [row[:top] for row in part.top_ids[there]]
        if self.ids:
            self.id_values[here] = np.array(part.id_values[there])[:, _places(self.ids, ids)]

    def read(self, start: int, stop: int, prompt: Sequence[int], ask: Ask) -> RowLists:
        """Of these rows those of positions [start, stop), for a prompt of which they are a part."""
        low, high = max(start, self.start), min(stop, self.stop)
        here = slice(low - self.start, max(high, low) - self.start)
        values = self.values[here].tolist()
        if self.following is not None and low < high == self.stop:
            values[-1] = self.following.get(prompt[high], float("nan"))
        return RowLists(
            values,
            self.top_values[here, : ask.top].tolist(),
            self.top_ids[here, : ask.top].tolist(),
            self.id_values[here][:, _places(ask.ids, self.ids)].tolist(),
        )

    @property
    def bytes(self) -> int:
        arrays = (self.values, self.top_values, self.top_ids, self.id_values)
        return sum(array.nbytes for array in arrays) + _BYTES_PER_FOLLOWING * len(
            self.following or ()
        )


class Lead(NamedTuple):
    """What a leader leaves: the rows of the nodes that it computes, and the union of what these
    take, from the first position on."""

    ask: Ask
    rows: dict[int, Rows]


class RowMemory:
    """What the kept rows of all batches take, in bytes.

    used, peak: now, and at most so far.
    """

    def __init__(self, limit: int = MAX_BYTES):
        self._limit = limit
        self.used = self.peak = 0

    def take(self, size: int) -> bool:
        """Whether there was room."""
        if self.used + size > self._limit:
            return False
        self.used += size
        self.peak = max(self.peak, self.used)
        return True

    def give_back(self, size: int) -> None:
        self.used -= size
