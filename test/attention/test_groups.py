from __future__ import annotations

import torch

from sglang_batchllm.attention.groups import GroupTable, get_group_table


class Pool:
    def __init__(self) -> None:
        self.req_to_token = torch.zeros((8, 16), dtype=torch.int32)


def test_rows_join_and_leave_groups() -> None:
    table = GroupTable(8, "cpu")
    table.assign([3, 5, 1], [10**9, 10**9, 7], [4, 4, 9])
    ids = table.group_id.tolist()
    assert ids[3] == ids[5] != ids[1]
    assert min(ids[3], ids[1]) > 0 and max(ids) <= 8
    assert table.prefix_len.tolist() == [0, 9, 0, 4, 0, 4, 0, 0]
    table.assign([3, 1], [0, 0], [0, 0])
    assert table.group_id.tolist() == [0, 0, 0, 0, 0, ids[5], 0, 0]
    assert table.prefix_len.tolist() == [0, 0, 0, 0, 0, 4, 0, 0]


def test_ids_are_recycled_and_rows_move() -> None:
    table = GroupTable(2, "cpu")
    for group in range(1, 50):
        table.assign(torch.tensor([0, 1]), torch.tensor([group, -1]), torch.tensor([3, 3]))
        assert table.group_id.tolist() == [1, 0]
    table.assign([0, 1], [5, 6], [2, 0])
    assert table.prefix_len.tolist() == [2, 0]
    table.assign([], [], [])
    table.assign([0], [0], [2])
    assert table.group_id.tolist() == [0, 0]
    assert table.prefix_len.tolist() == [0, 0]


def test_one_table_per_pool() -> None:
    pool, other = Pool(), Pool()
    assert get_group_table(pool, create=False) is None
    table = get_group_table(pool)
    assert table is not None and table.num_rows == 8
    assert get_group_table(pool) is table
    assert get_group_table(other) is not table
