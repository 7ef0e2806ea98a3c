from __future__ import annotations

import torch

from sglang_batchllm.attention.groups import GroupTable, get_group_table


class Pool:
    def __init__(self) -> None:
        self.req_to_token = torch.zeros((8, 16), dtype=torch.int32)


def test_rows_join_and_leave_groups() -> None:
    table = GroupTable(8, "cpu")
    table.assign([3, 5, 1], [[(10**9, 4)], [(10**9, 4), (3, 6)], [(7, 9)]])
    ids = table.group_id[0].tolist()
    assert ids[3] == ids[5] != ids[1]
    assert min(ids[3], ids[1]) > 0 and table.group_id.max() <= 8
    assert table.prefix_len[:2].tolist() == [[0, 9, 0, 4, 0, 4, 0, 0], [0, 0, 0, 0, 0, 6, 0, 0]]
    assert table.levels == 2
    table.assign([3, 1], [[], []])
    assert table.group_id[0].tolist() == [0, 0, 0, 0, 0, ids[5], 0, 0]
    assert table.prefix_len[0].tolist() == [0, 0, 0, 0, 0, 4, 0, 0]
    table.assign([5], [[(3, 2)]])
    assert table.levels == 1 and table.group_id[1:].sum() == 0 == table.prefix_len[1:].sum()


def test_ids_are_recycled_and_rows_move() -> None:
    table = GroupTable(2, "cpu")
    for group in range(1, 50):
        table.assign([0, 1], [[(group, 3)], []])
        assert table.group_id[0].tolist() == [1, 0]
    table.assign([0, 1], [[(5, 2)], []])
    assert table.prefix_len[0].tolist() == [2, 0]
    table.assign([], [])
    table.assign([0], [[]])
    assert table.group_id.sum() == 0 == table.prefix_len.sum()


def test_one_table_per_pool() -> None:
    pool, other = Pool(), Pool()
    assert get_group_table(pool, create=False) is None
    table = get_group_table(pool)
    assert table is not None and table.num_rows == 8
    assert get_group_table(pool) is table
    assert get_group_table(other) is not table
