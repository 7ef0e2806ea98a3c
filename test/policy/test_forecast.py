"""Admission by memory: the forecast against a step-by-step count, and what lengths are expected."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.policy.admission.forecast import MemoryForecast
from sglang_batchllm.policy.admission.outputs import (
    OutputLengths,
    RemainingOutput,
    expected_steps,
    expected_steps_of_one,
    hinted_output,
    most_output,
)
from sglang_batchllm.policy.admission.running import Running
from sglang_batchllm.policy.batch import Member

running_requests = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50)), max_size=12)


def peak_step_by_step(used: int, requests: list[tuple[int, int]]) -> int:
    """The most KV in use if each of the (steps, held) requests takes a token per step."""
    left = {index: steps for index, (steps, _) in enumerate(requests)}
    peak = used
    grown = dict.fromkeys(left, 0)
    while left:
        for index in left:
            grown[index] += 1
            left[index] -= 1
        use = used + sum(grown.values())
        peak = max(peak, use)
        for index in [index for index, steps in left.items() if steps == 0]:
            del left[index]
            used -= requests[index][1]
            del grown[index]
    return peak


@given(running_requests, st.tuples(st.integers(1, 30), st.integers(1, 50)), st.integers(1, 900))
def test_a_request_is_admitted_if_and_only_if_the_peak_fits(running, new, capacity):
    used = sum(held for _, held in running)
    forecast = MemoryForecast(capacity, used)
    for steps, held in running:
        forecast.add(steps, held)
    steps, tokens = new
    peak = peak_step_by_step(used + tokens, [*running, (steps, tokens)])
    assert forecast.admit(tokens, steps) == (not running or peak <= capacity)
    assert forecast.refused == (bool(running) and peak > capacity)


def test_requests_that_end_make_room_for_those_that_grow():
    forecast = MemoryForecast(100, 60)
    forecast.add(steps=5, freed=50)
    forecast.add(steps=30, freed=10)
    assert forecast.admit(20, 30)  # 80 now, 95 in 5 steps, and 90 at the end of the others
    assert not forecast.admit(20, 30)
    assert not forecast.admit(1, 1), "after a refusal smaller ones have to wait too"


def test_a_prefix_is_charged_once_and_let_go_with_its_last_use():
    forecast = MemoryForecast(1000, 0)
    assert forecast.admit(10, 100, prefix=700)
    assert not forecast.admit(10, 100, prefix=700)
    forecast = MemoryForecast(1000, 710)
    forecast.add(200, 10)
    forecast.add(200, 700, count=0)
    assert not forecast.admit(10, 300)
    forecast = MemoryForecast(1000, 710)
    forecast.add(20, 10)
    forecast.add(20, 700, count=0)
    assert forecast.admit(10, 300), "the prefix is gone before this one is long"


def test_many_at_once_are_as_many_one_by_one():
    one_by_one, at_once = MemoryForecast(200, 10), MemoryForecast(200, 10)
    one_by_one.add(7, 10)
    one_by_one.add(9, 20)
    at_once.add_all(np.array([9, 7]), np.array([20, 10]))
    assert all(one_by_one.admit(5, 12) for _ in range(10))
    assert at_once.admit(50, 12, count=10)
    assert one_by_one.admit(5, 12) == at_once.admit(5, 12)


def test_what_is_kept_is_never_given_back():
    forecast = MemoryForecast(100, 0)
    assert forecast.admit(40, 10, kept=True)
    assert forecast.admit(10, 30)
    assert not forecast.admit(20, 30), "50 are kept, 40 and 50 would grow beside them"
    forecast = MemoryForecast(100, 0)
    assert forecast.admit(40, 10)
    assert forecast.admit(10, 30)
    assert forecast.admit(20, 30)


def test_many_entries_are_as_many_one_by_one():
    together, apart = MemoryForecast(1000, 100), MemoryForecast(1000, 100)
    together.add_all(np.array([7.0, 9.0]), np.array([10.0, 20.0]), count=0)
    apart.add(7.0, 10.0, count=0)
    apart.add(9.0, 20.0, count=0)
    for forecast in (together, apart):
        forecast.add(3, 5)
    assert [together.admit(800, 30) for _ in range(2)] == [apart.admit(800, 30) for _ in range(2)]


def make_request(decoded: int, max_new_tokens: int) -> Any:
    sampling = SimpleNamespace(max_new_tokens=max_new_tokens)
    return SimpleNamespace(output_ids=[0] * decoded, sampling_params=sampling)


def test_expected_output():
    assert hinted_output("doc-7#out=120") == 120
    assert math.isnan(hinted_output("doc-7#out=120b"))
    assert most_output(make_request(30, 100)) == 70
    assert most_output(make_request(30, 20)) == 0
    assert most_output(make_request(0, 10**9)) == 4096


def remaining(lengths: OutputLengths, *running: tuple[int, int]) -> RemainingOutput:
    """running: row and decoded tokens of each."""
    rows, decoded = np.array(running, np.int64).reshape(-1, 2).T
    return lengths.remaining(rows, decoded)


def test_running_requests_keep_the_estimate_from_promising_too_much():
    lengths = OutputLengths()
    (row,) = lengths.take(-1).tolist()
    for _ in range(7):
        lengths.add(row, "stop", 10)
    assert remaining(lengths).of(row) == math.inf, "too little is known"
    for _ in range(3):
        lengths.add(row, "stop", 10)
    assert remaining(lengths).of(row) == 10
    # ten short ones ended, others have gone far beyond them
    assert remaining(lengths, (row, 150), (row, 250)).of(row) == 50


def test_requests_cut_off_at_their_limit_do_not_show_where_others_end():
    lengths = OutputLengths()
    (row,) = lengths.take(-1).tolist()
    for _ in range(15):
        lengths.add(row, "length", 30)
    for _ in range(5):
        lengths.add(row, "abort", 30)
    assert remaining(lengths).of(row) == math.inf
    for _ in range(10):
        lengths.add(row, "stop", 10)
    assert remaining(lengths).of(row) == 70


def test_a_set_of_which_little_is_known_goes_by_the_larger_one():
    lengths = OutputLengths()
    (everything,) = lengths.take(-1)
    (batch,) = lengths.take(int(everything))
    first, second = lengths.take(int(batch), 2)
    for _ in range(8):
        lengths.add(int(first), "stop", 20)
    known = remaining(lengths, (int(second), 80))
    assert known.of(int(first)) == 20
    assert known.of(int(second)) == known.of(int(batch)) == known.of(int(everything)) == 30
    rows = np.array([first, second, everything])
    assert known.of_each(rows).tolist() == [20, 30, 30]


def test_rows_given_back_begin_anew():
    lengths = OutputLengths()
    rows = lengths.take(-1, 100)
    for _ in range(8):
        lengths.add(int(rows[3]), "stop", 20)
    lengths.give_back(rows)
    assert set(lengths.take(-1, 100).tolist()) == set(rows.tolist())
    assert remaining(lengths).of(int(rows[3])) == math.inf


def test_batches_without_groups_take_no_rows():
    lengths = OutputLengths()
    for _ in range(100):
        (own,) = lengths.take(-1)
        groups = lengths.take(int(own), 0)
        assert len(groups) == 0
        lengths.give_back(np.append(groups, own))
    assert len(lengths.take(-1, 64)) == 64
    assert len(lengths._ended) == 64, "rows are used again"


def test_running_entries_move_up():
    running = Running()
    members = [Member(make_request(i, 10)) for i in range(200)]
    for own, member in enumerate(members):
        running.add(
            member,
            **dict.fromkeys(("hint", "max_output", "row", "batch", "home", "home_depth"), 0),
            own=own,
            kept=False,
            at_root=False,
        )
    for member in members[::2]:
        running.remove(member)
        running.remove(member)  # once is enough
    assert sorted(running.own.tolist()) == list(range(1, 200, 2))
    assert all(running.own[m.slot] == i for i, m in enumerate(members) if i % 2)
    assert sorted(running.decoded().tolist()) == sorted(running.own.tolist())


@given(
    st.one_of(st.just(math.nan), st.integers(0, 30).map(float)),
    st.integers(0, 30),
    st.integers(0, 30),
    st.one_of(st.just(math.inf), st.floats(0, 30)),
)
def test_one_request_is_expected_to_take_as_long_as_among_others(hint, decoded, most, shown):
    assert expected_steps_of_one(hint, decoded, most, shown) == expected_steps(
        np.array([hint]), np.array([decoded]), np.array([most]), np.array([shown])
    )
