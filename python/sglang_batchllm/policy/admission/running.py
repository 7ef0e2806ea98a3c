"""The requests that hold KV, as arrays: what a step asks of them costs the same however they were
cut into batches."""

from __future__ import annotations

import numpy as np

from sglang_batchllm.policy.batch import Member

_FLOATS = ("hint",)
_INTEGERS = ("max_output", "own", "row", "batch", "home", "home_depth")
_FLAGS = ("kept", "at_root")


class Running:
    """An entry per request; the columns are numpy arrays of that length.

    hint: expected output by its caller, or NaN. max_output: tokens that it may decode. own: prompt
    tokens that nobody shares. row: of `OutputLengths`. batch: number of its batch, -1 for none.
    home, home_depth: its deepest shared node as `Batch.node_id` names it (-1 for none), and the
    tokens down to there. at_root: nothing is shared above that. kept: what it holds outlives it.
    """

    hint: np.ndarray
    max_output: np.ndarray
    own: np.ndarray
    row: np.ndarray
    batch: np.ndarray
    home: np.ndarray
    home_depth: np.ndarray
    kept: np.ndarray
    at_root: np.ndarray

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._columns = {name: np.zeros(64) for name in _FLOATS}
        self._columns |= {name: np.zeros(64, np.int64) for name in _INTEGERS}
        self._columns |= {name: np.zeros(64, bool) for name in _FLAGS}

    def __len__(self) -> int:
        return len(self.members)

    def __getattr__(self, name: str) -> np.ndarray:
        columns = self.__dict__.get("_columns", {})
        if name not in columns:
            raise AttributeError(name)
        return columns[name][: len(self.members)]

    def add(self, member: Member, **values: float) -> None:
        """values: one for each column."""
        slot = len(self.members)
        if slot == len(self._columns["own"]):
            self._columns = {
                name: np.concatenate([column, np.zeros_like(column)])
                for name, column in self._columns.items()
            }
        for name, column in self._columns.items():
            column[slot] = values[name]
        self.members.append(member)
        member.slot = slot

    def remove(self, member: Member) -> None:
        slot, member.slot = member.slot, -1
        if slot < 0:
            return
        last = self.members.pop()
        if last is not member:
            for column in self._columns.values():
                column[slot] = column[len(self.members)]
            self.members[slot] = last
            last.slot = slot

    def decoded(self) -> np.ndarray:
        """Tokens that each has decoded so far, int64[n]."""
        return np.fromiter(
            (len(member.request.output_ids) for member in self.members),
            np.int64,
            len(self.members),
        )
