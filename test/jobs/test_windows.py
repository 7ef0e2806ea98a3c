"""The order of a job's rows, and what goes to a server in one piece."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.jobs.index import PLACES, Index
from sglang_batchllm.jobs.order import FIRST_WINDOW, Order, plan_rows

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40)
ROWS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=400)


def index_of(folder: str, prompts: list[list[int]], spaces: list[int]) -> Index:
    places = np.zeros(len(prompts), PLACES)
    places["prompt"] = [len(prompt) for prompt in prompts]
    places["space"] = spaces
    path = Path(folder) / "ids"
    path.write_bytes(np.concatenate([np.array(prompt, np.int32) for prompt in prompts]).tobytes())
    return Index(places, [], path, "tokens")


def common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


@given(PROMPTS, st.data())
def test_an_order_is_the_plan_without_what_is_done(prompts: list[list[int]], data: st.DataObject):
    count = len(prompts)
    spaces = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    with TemporaryDirectory() as folder:
        plan = plan_rows(index_of(folder, prompts, spaces))
    order = Order.of(plan, wanted)
    assert order.rows.tolist() == [row for row in plan.order.tolist() if wanted[row]]
    assert len(order.shared) == len(order.rows)
    rows = order.rows.tolist()
    for before, row, shared in zip(rows, rows[1:], order.shared[1:].tolist(), strict=False):
        same = spaces[before] == spaces[row]
        assert shared <= (common(prompts[before], prompts[row]) if same else 0)


def test_rows_of_other_weights_share_nothing():
    with TemporaryDirectory() as folder:
        index = index_of(folder, [[1, 2, 3]] * 4, [0, 1, 0, 1])
        plan = plan_rows(index)
    assert plan.report.distinct_tokens > 3
    assert sorted(Order.of(plan, np.ones(4, bool)).shared.tolist())[:2] == [0, 0]


@given(ROWS, st.integers(1, 200), st.integers(1, 500))
def test_windows_cover_the_order_once_within_limits(rows: list, most: int, most_bytes: int):
    count = len(rows)
    order = Order(np.arange(count)[::-1].copy(), np.array([each[0] for each in rows], np.int64))
    sizes = np.array([each[1] for each in rows], np.uint32)
    windows = [window.tolist() for window in order.windows(sizes, most, most_bytes)]
    assert [row for window in windows for row in window] == order.rows.tolist()
    limit, start = min(FIRST_WINDOW, most), 0
    for window in windows:
        assert 1 <= len(window) <= limit
        assert len(window) == 1 or sizes[window].sum() <= most_bytes
        fits = 1
        while (
            start + fits < count
            and fits < limit
            and sizes[order.rows[start : start + fits + 1]].sum() <= most_bytes
        ):
            fits += 1
        end = start + len(window)
        if start + fits == count:
            assert end == count
        else:  # the latest of the best places from the middle on
            middle = start + (fits + 1) // 2
            places = [*range(middle, start + fits + 1)]
            shared = order.shared.tolist()
            assert end == max(places, key=lambda at: (-shared[at], at))
        start, limit = end, min(2 * limit, most)


def test_the_first_window_is_small_and_the_next_ones_are_larger():
    count = 10_000
    order = Order(np.arange(count), np.zeros(count, np.int64))
    sizes = np.ones(count, np.uint32)
    lengths = [len(window) for window in order.windows(sizes, 1000, 1 << 20)]
    assert lengths[:6] == [64, 128, 256, 512, 1000, 1000]
    assert sum(lengths) == count
