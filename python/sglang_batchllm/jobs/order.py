"""The order of a job's rows, and its windows: what goes to a server in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sglang_batchllm.jobs.index import Index
from sglang_batchllm.planning.plan import BatchPlan, plan_batch

FIRST_WINDOW = 64
"""Requests of the first window, so that the engine has something soon; each is twice as large as
the one before, up to the limit."""


def plan_rows(index: Index, page_size: int = 1) -> BatchPlan:
    """One plan over all rows of an index."""
    spaces = index.places["space"]
    alike = not len(spaces) or bool((spaces == spaces[0]).all())
    return plan_batch(
        index.table(),
        page_size,
        expected_output_lens=index.places["output"],
        namespaces=None if alike else spaces.tolist(),
    )


@dataclass(frozen=True)
class Order:
    """rows: int64[n], in order of execution. shared: int64[n], ids that each has in common with the
    row before it."""

    rows: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, plan: BatchPlan, wanted: np.ndarray) -> Order:
        """Those rows of a plan that are wanted, bool[all]."""
        rows = plan.order
        shared = (plan.prompt_lens - plan.to_compute)[rows]
        keep = wanted[rows]
        # Where rows in between are done, what is common to both ends is what is common to all.
        starts = np.flatnonzero(keep)
        if len(starts):
            firsts = np.concatenate([[0], starts[:-1] + 1])
            shared = np.minimum.reduceat(shared[: starts[-1] + 1], firsts)
        return cls(rows[keep], shared[: len(starts)])

    def windows(self, sizes: np.ndarray, most: int, most_bytes: int) -> Iterator[np.ndarray]:
        """Rows of each window, int64[m]: at most so many, and so many bytes, or one row. Cut where
        neighbours have least in common, and not before half of what a window may have.

        sizes: bytes of each row, by row.
        """
        in_order = sizes[self.rows].astype(np.int64)
        ends = np.cumsum(in_order)
        start, limit = 0, min(FIRST_WINDOW, most)
        while start < len(self.rows):
            before = ends[start] - in_order[start]
            fits = int(np.searchsorted(ends, before + most_bytes, side="right"))
            last = max(start + 1, min(start + limit, fits))
            end = last
            middle = start + (last - start + 1) // 2
            if middle < last < len(self.rows):
                end -= int(
                    np.argmin(self.shared[middle : last + 1][::-1])
                )  # the latest of the best
            yield self.rows[start:end]
            start, limit = end, min(2 * limit, most)
