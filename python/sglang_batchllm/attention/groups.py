"""Which running requests share a prefix: the runtime's word to the attention backend.

The runtime and the backend of one scheduler process meet at the request-to-token pool, the one
object both hold: ``get_group_table(pool)`` gives both the same table.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

_TABLES: WeakKeyDictionary[Any, GroupTable] = WeakKeyDictionary()


LEVELS = 8
"""Most nodes of a path; a request reads them one after another, and merges what it read."""


class GroupTable:
    """Which nodes of the prefix tree the running requests share, on the device, by row of the
    request pool.

    group_id: int32 [LEVELS, num_rows], 0 for none; rows with equal ids at a level share that node,
    and all above it. The ids are the table's own, 1 to num_rows at each level: the caller's may be
    any positive integers, and the backend counts members in an array indexed by id. prefix_len:
    int32 [LEVELS, num_rows], tokens from the root to the node's end, 0 for none.

    Live rows of one node have the same slots in ``req_to_token[row, :prefix_len]``, and a row's
    sequence is longer than its prefixes. Call ``assign`` on the stream that also writes
    ``req_to_token``, so that a running step does not see it half-way, whenever a row changes
    hands; a row that no request holds is not looked at.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.num_rows = num_rows
        self.device = torch.device(device)
        self._table = torch.zeros((2 * LEVELS, num_rows), dtype=torch.int32, device=self.device)
        self.group_id = self._table[:LEVELS]
        self.prefix_len = self._table[LEVELS:]
        self._levels = [_Ids(num_rows) for _ in range(LEVELS)]
        self._held = np.zeros((LEVELS, num_rows), np.int32)  # group_id, on the host

    @property
    def levels(self) -> int:
        """Levels in use."""
        return next((n for n in range(LEVELS, 0, -1) if self._levels[n - 1].used), 0)

    def assign(self, rows: Sequence[int], paths: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Put rows into groups, with one small asynchronous copy.

        rows: of the request pool. paths: for each, the nodes that it shares, outermost first, each
        as its id and the tokens from the root to its end, which rise; at most LEVELS. A row leaves
        what it was in. Rows whose paths are the same object cost little more than one of them.
        """
        if not rows:
            return
        used = self._held[: self.levels, rows].tolist()
        for ids, numbers in zip(self._levels, used, strict=False):
            ids.leave(numbers)
        different = {id(path): path for path in paths}
        members = Counter(map(id, paths))
        columns = np.zeros((len(different), 2 * LEVELS), np.int32)
        for at, (name, path) in enumerate(different.items()):
            columns[at, : len(path)] = [
                ids.join(group, members[name])
                for ids, (group, _) in zip(self._levels, path, strict=False)
            ]
            columns[at, LEVELS : LEVELS + len(path)] = [length for _, length in path]
        place = {name: at for at, name in enumerate(different)}
        values = np.empty((1 + 2 * LEVELS, len(rows)), np.int32)
        values[0] = rows
        values[1:] = columns.T[:, [place[id(path)] for path in paths]]
        self._held[:, rows] = values[1 : 1 + LEVELS]
        packed = torch.from_numpy(values)
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        self._table.index_copy_(1, packed[0].long(), packed[1:])


class _Ids:
    """The ids of one level: 1 to num_rows, the least that is free for the next group."""

    def __init__(self, num_rows: int) -> None:
        self._rows = [0] * (num_rows + 1)
        self._of_group: dict[int, int] = {}
        self._group: dict[int, int] = {}
        self._free = list(range(1, num_rows + 1))

    @property
    def used(self) -> bool:
        return bool(self._group)

    def join(self, group: int, rows: int) -> int:
        """The group's id, for so many rows more."""
        number = self._of_group.get(group)
        if number is None:
            # Every id has a row, so there are never more ids in use than rows.
            number = heapq.heappop(self._free)
            self._of_group[group] = number
            self._group[number] = group
        self._rows[number] += rows
        return number

    def leave(self, numbers: Sequence[int]) -> None:
        """The ids of rows that leave, 0 for those that have none."""
        for number in numbers:
            if number == 0:
                continue
            self._rows[number] -= 1
            if self._rows[number] == 0:
                del self._of_group[self._group.pop(number)]
                heapq.heappush(self._free, number)


def get_group_table(req_to_token_pool: Any, create: bool = True) -> GroupTable | None:
    """The table of a request-to-token pool (``ReqToTokenPool``), made on first use by default."""
    table = _TABLES.get(req_to_token_pool)
    if table is None and create:
        req_to_token = req_to_token_pool.req_to_token
        table = GroupTable(req_to_token.shape[0], req_to_token.device)
        _TABLES[req_to_token_pool] = table
    return table
