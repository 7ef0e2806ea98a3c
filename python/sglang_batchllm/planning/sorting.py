"""Sorting prompts by prefix, in memory that does not grow with their tokens.

The tokens stay where they are, which may be on disk. In each round, requests that are equal so far
are sorted by their next few tokens, and those still equal go on. So a token is read once, or twice
where a large group has it in common, and none behind the place where a request is told apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sglang_batchllm.planning.tokens import TokenTable
from sglang_batchllm.planning.windows import Windows, blocks

ROUND_TOKENS = 1 << 23
"""Most tokens in a round, but for one of each request."""

_FIRST_WIDTH, _WIDENING = 16, 4
"""Tokens of a request in the first round, and how much more in each later one: most requests that
differ do so early."""

_SMALL_ROUND = 1 << 16
"""Tokens that are read in one round although fewer might do: reading them is no dearer."""


@dataclass(frozen=True, eq=False)
class SortedPrompts:
    """Prompts in an order in which those with a common prefix are neighbours.

    order: int64[n], request indices. A prompt comes before its extensions, equal prompts by index.
    common: int64[n], tokens each shares with the one before it; 0 across namespaces.
    """

    order: np.ndarray
    common: np.ndarray


@dataclass(frozen=True, eq=False)
class _Tied:
    """Groups of requests, each group's equal in their first `depth` tokens.

    positions: int64[m], their places in the order, rising. group: int32[m], rising.
    width: tokens to read of each, where nothing speaks against it.
    """

    positions: np.ndarray
    group: np.ndarray
    depth: int
    width: int

    def split(self, rows: int) -> Iterator["_Tied"]:
        """Parts of at most `rows` requests, or of one group with more."""
        start, group = 0, self.group
        while start < len(group):
            end = min(start + rows, len(group))
            if end < len(group):
                end = int(np.searchsorted(group, group[end]))
                if end <= start:
                    end = int(np.searchsorted(group, group[start], "right"))
            yield _Tied(self.positions[start:end], group[start:end], self.depth, self.width)
            start = end


def sort_prompts(table: TokenTable, namespace_rank: np.ndarray) -> SortedPrompts:
    """Sort the prompts of a table from `as_table`.

    namespace_rank: int32[n]; prompts of one rank come together, the lower rank first.

    Within a rank the order is that of the tokens' bytes. It is not the numeric order, but all
    that building a prefix tree needs, and compares at the speed of memcmp.

    Memory is at most 150 bytes per request, with the result, and 32 per token of a round.
    """
    windows = Windows(table)
    starts_of, lens = table.offsets[:-1], np.diff(table.offsets)
    order = np.argsort(namespace_rank, kind="stable")
    common = np.zeros(len(lens), np.int64)
    waiting = [_Tied(np.arange(len(lens)), namespace_rank[order], 0, _FIRST_WIDTH)]
    while waiting:
        tied = waiting.pop()
        rows = len(tied.positions)
        if rows < 2:
            continue
        requests = order[tied.positions]
        remaining = lens[requests] - tied.depth
        # Wider than twice the mean would be mostly padding; half of the requests end within that.
        enough = min(int(remaining.max()), 2 * int(remaining.sum()) // rows + 1)
        width = min(max(tied.width, _SMALL_ROUND // rows), enough)
        depth = tied.depth
        if rows * width > ROUND_TOKENS:
            # Groups can be sorted apart; one that is too large by itself takes several rounds, and
            # skips what all of it has in common, in one pass over the file.
            if tied.group[0] != tied.group[-1]:
                waiting += reversed([*tied.split(max(1, ROUND_TOKENS // width))])
                continue
            ahead = windows.common_to_all(starts_of[requests] + depth, remaining)
            depth, remaining = depth + ahead, remaining - ahead
            width = max(1, ROUND_TOKENS // rows)

        starts = starts_of[requests] + depth
        records = _records(windows, starts, remaining, tied.group, width)
        rank = np.argsort(records, kind="stable")
        order[tied.positions] = requests[rank]
        remaining = remaining[rank]

        same = _common_to_neighbours(records, rank, windows.dtype)
        here = np.minimum(remaining, width)
        same[1:] = np.minimum(same[1:], np.minimum(here[1:], here[:-1]))
        joined = np.zeros(rows, np.bool_)
        joined[1:] = tied.group[1:] == tied.group[:-1]
        common[tied.positions[joined]] = depth + same[joined]

        goes_on = remaining > width
        # From here, joined are those that are not told apart yet.
        joined[1:] &= (same[1:] == width) & goes_on[1:] & goes_on[:-1]
        still = joined.copy()
        still[:-1] |= joined[1:]
        group = np.cumsum(~joined, dtype=np.int32)[still]
        waiting.append(_Tied(tied.positions[still], group, depth + width, _WIDENING * width))
    return SortedPrompts(order, common)


def _records(
    windows: Windows, starts: np.ndarray, remaining: np.ndarray, group: np.ndarray, width: int
) -> np.ndarray:
    """The requests' next `width` tokens as values that sort by their bytes, m of them.

    Each is the group, the tokens, zeros where there are fewer, and how many there are, with one
    more for a request that goes on: that puts a prompt before its extensions, also before one by
    tokens that are zero.
    """
    size = windows.dtype.itemsize
    tokens = f"V{width * size}"
    number = f">i{size}"
    records = np.empty(len(starts), [("group", number), ("tokens", tokens), ("count", number)])
    records["group"] = group
    records["count"] = np.minimum(remaining, width + 1)
    by_place = np.argsort(starts)  # as a disk reads best
    for part in blocks(len(starts), width):
        rows = by_place[part]
        found = windows.read(starts[rows], remaining[rows], width)
        records["tokens"][rows] = found.view(tokens).reshape(-1)
    return records.view(f"V{records.itemsize}")


def _common_to_neighbours(records: np.ndarray, rank: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """int64[m], equal tokens at the start of each record, in order of `rank`, and the one before;
    0 for the first."""
    width = records.itemsize // dtype.itemsize - 2
    same = np.zeros(len(rank), np.int64)
    for part in blocks(len(rank) - 1, width):
        rows = records[rank[part.start : part.stop + 1]].view(dtype).reshape(-1, width + 2)[:, 1:-1]
        differs = rows[1:] != rows[:-1]
        first = differs.argmax(axis=1)
        differ = differs[np.arange(len(first)), first]
        same[1:][part] = np.where(differ, first, width)
    return same
