"""How many tokens a request is expected to decode."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from sglang_batchllm.policy.requests import End, Request

MAX_EXPECTED_OUTPUT = 4096
"""Cap on the output that is set aside for a request, in tokens; SGLang's own admission caps its
estimate at the same number by default."""

ENOUGH_FINISHED = 8
"""Requests that ended by themselves from which a length is estimated."""

EXTRA_STEPS = 1
"""With overlap scheduling a request takes one more slot before it is known to have ended."""

_HINT = re.compile(r"#out=(\d+)$")


def hinted_output(rid: str) -> float:
    """The caller's hint: a request id that ends in ``#out=120`` announces about 120 tokens. NaN
    if there is none."""
    found = _HINT.search(rid)
    return float(found[1]) if found else math.nan


def most_output(request: Request) -> int:
    """Tokens that the request may still decode, capped; SGLang fills in max_new_tokens."""
    left = (request.sampling_params.max_new_tokens or 0) - len(request.output_ids)
    return max(min(left, MAX_EXPECTED_OUTPUT), 0)


def expected_steps(hint: Any, decoded: Any, most: Any, shown: Any) -> Any:
    """Decode steps for which requests are expected to hold their KV from now on.

    All are numbers or arrays with an entry per request. hint: the caller's, or NaN. decoded:
    tokens so far. most: see `most_output`. shown: see `OutputLengths.remaining`, or infinity.
    """
    announced = hint - decoded
    return np.minimum(np.where(announced > 0, announced, shown), most) + EXTRA_STEPS


def expected_steps_of_one(hint: float, decoded: int, most: int, shown: float) -> float:
    """`expected_steps` of one request, in a tenth of the time that NumPy takes for it."""
    announced = hint - decoded
    return min(announced if announced > 0 else shown, most) + EXTRA_STEPS


class OutputLengths:
    """What sets of requests show about their output lengths, a row per set; each set but one is
    part of a larger one, its parent: a prefix group of its batch, a gathered batch of all gathered.

    Requests that still run count too, by what they have decoded so far: early on only the short
    ones have finished, and their mean alone would promise too much. So do those that were cut off
    at their max_new_tokens or aborted. The estimate is the maximum likelihood mean of a geometric
    length with censored observations, tokens seen per request that ended by itself. Being
    memoryless it is also what any of them is expected to decode from now on.
    """

    def __init__(self) -> None:
        self._ended = np.zeros(0, np.int64)
        self._tokens = np.zeros(0, np.int64)
        self._parent = np.zeros(0, np.int64)
        self._free: list[int] = []

    def take(self, parents: np.ndarray | int, count: int = 1) -> np.ndarray:
        """`count` new rows, int64[count], each under its parent row; -1 for none."""
        missing = count - len(self._free)
        if missing > 0:
            size = len(self._ended)
            more = max(missing, size, 64)
            self._free[:0] = range(size, size + more)
            self._ended, self._tokens, self._parent = (
                np.concatenate([column, np.zeros(more, np.int64)])
                for column in (self._ended, self._tokens, self._parent)
            )
        kept = len(self._free) - count
        rows = np.array(self._free[kept:], np.int64)
        del self._free[kept:]
        self._ended[rows] = self._tokens[rows] = 0
        self._parent[rows] = parents
        return rows

    def give_back(self, rows: np.ndarray) -> None:
        self._free += rows.tolist()

    def add(self, row: int, end: End, tokens: int) -> None:
        """A request of the row, and so of its parents, has ended after decoding `tokens`."""
        while row >= 0:
            self._ended[row] += end == "stop"
            self._tokens[row] += tokens
            row = int(self._parent[row])

    def remaining(self, rows: np.ndarray, decoded: np.ndarray) -> RemainingOutput:
        """What is known now. rows, decoded: of the requests that run, their sets and the tokens
        that each has decoded, int64[n]."""
        size = len(self._ended)
        seen = self._tokens.copy()
        while len(rows):
            seen += np.bincount(rows, decoded, size).astype(np.int64)
            rows = self._parent[rows]
            inside = rows >= 0
            rows, decoded = rows[inside], decoded[inside]
        return RemainingOutput(self._ended, seen, self._parent)


class RemainingOutput:
    """Tokens still to come of any request of a set, as far as is known at one moment."""

    def __init__(self, ended: np.ndarray, seen: np.ndarray, parent: np.ndarray):
        """Arrays with an entry per row: requests that ended by themselves, tokens decoded by all,
        and the row of the larger set."""
        self._ended = ended
        self._seen = seen
        self._parent = parent
        self._known: dict[int, float] = {}

    def of(self, row: int) -> float:
        """By the smallest set around `row` of which enough have ended; infinity if none."""
        known = self._known.get(row)
        if known is None:
            at = row
            while at >= 0 and self._ended[at] < ENOUGH_FINISHED:
                at = int(self._parent[at])
            known = float(self._seen[at] / self._ended[at]) if at >= 0 else math.inf
            self._known[row] = known
        return known

    def of_each(self, rows: np.ndarray) -> np.ndarray:
        """`of` for each entry of int64[n], float64[n]."""
        at = rows.copy()
        while True:
            lacking = (at >= 0) & (self._ended[at] < ENOUGH_FINISHED)
            if not lacking.any():
                break
            at[lacking] = self._parent[at[lacking]]
        known = at >= 0
        steps = np.full(len(at), math.inf)
        steps[known] = self._seen[at[known]] / self._ended[at[known]]
        return steps
