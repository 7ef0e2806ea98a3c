"""Logprobs of shared prompt tokens, left by whoever computes them for all who ask.

A forward pass gives a *row* for each prompt position: the logprob of the token after it, the most
likely tokens there, and the logprobs of token ids that were asked for. All who share a prefix have
the same rows, except that the row of its last position tells of a token that is no longer shared.
The plan knows every token that follows, so of that row the logprobs of all of these are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

MAX_BYTES = 1 << 30
"""Of all rows that are kept at one time; what does not fit is computed again."""

NAN = float("nan")
_NEVER = np.iinfo(np.int64).max

T = TypeVar("T")


class Ask(NamedTuple):
    """Rows that somebody wants: from prompt position `start` on, each with the `top` most likely
    tokens and the logprobs of the token ids `ids`."""

    start: int
    top: int
    ids: tuple[int, ...]


class RowLists(NamedTuple):
    """Rows: a logprob each, and a list each of logprobs or token ids."""

    values: list[float]
    top_values: list[list[float]]
    top_ids: list[list[int]]
    id_values: list[list[float]]


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

    top, ids: what each row has. following: the logprob of each token that comes after the last
    position, where that is not the same for all; else None. All is NaN until it is filled as
    forward passes end; whoever reads it runs in a later pass.

    Rows are lists, as SGLang has them and sends them: those who share them then share the very
    lists, which are written once into a message and not converted for each request.
    """

    def __init__(self, start: int, stop: int, ask: Ask, following: Sequence[int] | None):
        self.start, self.stop, self.top, self.ids = start, stop, ask.top, ask.ids
        self.following = None if following is None else dict.fromkeys(following, NAN)
        count = stop - start
        self._values: list[float] = [NAN] * count
        self._top_values: list[list[float]] = [[NAN] * ask.top] * count
        self._top_ids: list[list[int]] = [[0] * ask.top] * count
        self._id_values: list[list[float]] = [[NAN] * len(ask.ids)] * count

    def fill(self, start: int, part: RowLists, ids: Sequence[int]) -> None:
        """A pass has computed rows from position `start` on, with at least `top` tokens and, among
        others, all of `ids`."""
        low, high = max(start, self.start), min(start + len(part.values), self.stop)
        if low >= high:
            return
        here, there = slice(low - self.start, high - self.start), slice(low - start, high - start)
        self._values[here] = part.values[there]
        if self.top:
            self._top_values[here] = _first(self.top, part.top_values[there])
            self._top_ids[here] = _first(self.top, part.top_ids[there])
        if self.ids:
            self._id_values[here] = _columns(self.ids, ids, part.id_values[there])

    def read(self, start: int, stop: int, prompt: Sequence[int], ask: Ask) -> RowLists:
        """Of these rows those of positions [start, stop), for a prompt of which they are a part."""
        low, high = max(start, self.start), min(stop, self.stop)
        here = slice(low - self.start, max(high, low) - self.start)
        values = self._values[here]
        if self.following is not None and low < high == self.stop:
            values[-1] = self.following.get(prompt[high], NAN)
        return RowLists(
            values,
            _first(ask.top, self._top_values[here]),
            _first(ask.top, self._top_ids[here]),
            _columns(ask.ids, self.ids, self._id_values[here]),
        )

    @property
    def bytes(self) -> int:
        """About what the lists take of CPython's memory."""
        row = 32 + (144 + 64 * self.top if self.top else 0)
        row += 72 + 32 * len(self.ids) if self.ids else 0
        return row * (self.stop - self.start) + 100 * len(self.following or ())


def _first(count: int, lists: list[list[T]]) -> list[list[T]]:
    """The first elements of each list: the very lists, where they have no more."""
    if not lists or len(lists[0]) == count:
        return lists
    return [one[:count] for one in lists]


def _columns(
    wanted: Sequence[int], ids: Sequence[int], lists: list[list[float]]
) -> list[list[float]]:
    """Of lists with an element for each of `ids` those of the wanted ones, in their order."""
    if tuple(wanted) == tuple(ids):
        return lists
    places = [ids.index(token) for token in wanted]
    return [[one[place] for place in places] for one in lists]


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
