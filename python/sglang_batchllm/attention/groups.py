"""Which running requests share a prefix: the runtime's word to the attention backend.

The runtime and the backend of one scheduler process meet at the request-to-token pool, the one
object both hold: ``get_group_table(pool)`` gives both the same table.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

_TABLES: WeakKeyDictionary[Any, GroupTable] = WeakKeyDictionary()


class GroupTable:
    """Prefix groups of the running requests, on the device, indexed by row of the request pool.

    group_id: int32 [num_rows], 0 for none; rows with equal ids share a prefix. The ids are the
    table's own, 1 to num_rows: the caller's may be any positive integers, and the backend counts
    members in an array indexed by id. prefix_len: int32 [num_rows], tokens of the shared prefix,
    0 for none.

    Live rows of one group have the same slots in ``req_to_token[row, :prefix_len]`` and the same
    prefix_len; a row's sequence is longer than its prefix. Call ``assign`` on the stream that
    also writes ``req_to_token``, so that a running step does not see it half-way, whenever a row
    changes hands; a row that no request holds is not looked at.
    """

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.num_rows = num_rows
        self.device = torch.device(device)
        self._table = torch.zeros((2, num_rows), dtype=torch.int32, device=self.device)
        self.group_id = self._table[0]
        self.prefix_len = self._table[1]
        self._slot_of_row: dict[int, int] = {}
        self._rows_of_slot: dict[int, int] = {}
        self._slot_of_group: dict[int, int] = {}
        self._group_of_slot: dict[int, int] = {}
        self._free = list(range(1, num_rows + 1))

    def assign(
        self,
        rows: Sequence[int] | torch.Tensor,
        group_ids: Sequence[int] | torch.Tensor,
        prefix_lens: Sequence[int] | torch.Tensor,
    ) -> None:
        """Put rows into groups (0 or less: into none), with one small asynchronous copy.

        rows, group_ids, prefix_lens: host integers of equal number. A row that is in a group
        leaves it.
        """
        row_list = _host_list(rows)
        slots: list[int] = []
        lengths: list[int] = []
        for row, group, length in zip(
            row_list, _host_list(group_ids), _host_list(prefix_lens), strict=True
        ):
            self._leave(row)
            shares = group > 0 and length > 0
            slots.append(self._join(row, group) if shares else 0)
            lengths.append(length if shares else 0)
        self._write(row_list, slots, lengths)

    def _join(self, row: int, group: int) -> int:
        slot = self._slot_of_group.get(group)
        if slot is None:
            # Every slot has a row, so there are never more slots in use than rows.
            slot = heapq.heappop(self._free)
            self._slot_of_group[group] = slot
            self._group_of_slot[slot] = group
            self._rows_of_slot[slot] = 0
        self._rows_of_slot[slot] += 1
        self._slot_of_row[row] = slot
        return slot

    def _leave(self, row: int) -> None:
        slot = self._slot_of_row.pop(row, None)
        if slot is None:
            return
        self._rows_of_slot[slot] -= 1
        if self._rows_of_slot[slot] == 0:
            del self._rows_of_slot[slot]
            del self._slot_of_group[self._group_of_slot.pop(slot)]
            heapq.heappush(self._free, slot)

    def _write(self, rows: list[int], slots: list[int], lengths: list[int]) -> None:
        if not rows:
            return
        packed = torch.tensor([rows, slots, lengths], dtype=torch.int32)
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        self._table.index_copy_(1, packed[0].long(), packed[1:])


def get_group_table(req_to_token_pool: Any, create: bool = True) -> GroupTable | None:
    """The table of a request-to-token pool (``ReqToTokenPool``), made on first use by default."""
    table = _TABLES.get(req_to_token_pool)
    if table is None and create:
        req_to_token = req_to_token_pool.req_to_token
        table = GroupTable(req_to_token.shape[0], req_to_token.device)
        _TABLES[req_to_token_pool] = table
    return table


def _host_list(values: Sequence[int] | torch.Tensor) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else [int(v) for v in values]
