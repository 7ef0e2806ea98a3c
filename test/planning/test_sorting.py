"""Sorting in rounds: batches on disk, in memory that their tokens do not fill."""

import time
import tracemalloc
from collections.abc import Hashable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning_references import batches, thorough
from sglang_batchllm.planning import BatchPlan, TokenTable, plan_batch, sorting
from sglang_batchllm.planning.plan import BYTES_AT_ONCE, BYTES_PER_REQUEST
from sglang_batchllm.planning.sorting import sort_prompts
from sglang_batchllm.planning.tokens import as_table


def table_of(prompts: Sequence[Sequence[int]], dtype: Any = np.int32) -> TokenTable:
    tokens = np.array([token for prompt in prompts for token in prompt], dtype)
    return TokenTable(tokens, np.cumsum([0, *map(len, prompts)]))


def on_disk(table: TokenTable, path: Path) -> TokenTable:
    table.tokens.tofile(path)
    return TokenTable(np.memmap(path, table.tokens.dtype, "r"), table.offsets)


def small_rounds(monkeypatch: pytest.MonkeyPatch, tokens: int, first: int = 1) -> None:
    monkeypatch.setattr(sorting, "ROUND_TOKENS", tokens)
    monkeypatch.setattr(sorting, "_FIRST_WIDTH", first)
    monkeypatch.setattr(sorting, "_SMALL_ROUND", 1)


ROUNDS = st.tuples(st.sampled_from([1, 3, 10, 50, 1000]), st.sampled_from([1, 2, 7]))


@thorough
@given(batches(max_prompts=30), ROUNDS, st.sampled_from([np.int32, np.int64, np.uint16]), st.data())
def test_sorting_in_rounds_is_sorting_by_bytes(
    prompts: list[list[int]], rounds: tuple[int, int], dtype: Any, data: st.DataObject
) -> None:
    """Tokens are 0 and 1, so a prompt may go on with what pads it."""
    ranks = data.draw(st.lists(st.integers(0, 2), min_size=len(prompts), max_size=len(prompts)))
    with pytest.MonkeyPatch.context() as patch:
        small_rounds(patch, *rounds)
        found = sort_prompts(as_table(table_of(prompts, dtype)), np.array(ranks, np.int32))
    keys = [(rank, np.array(p, "<i4").tobytes()) for rank, p in zip(ranks, prompts, strict=True)]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    assert found.order.tolist() == order
    for position, request in enumerate(order):
        common = 0
        if position and ranks[request] == ranks[order[position - 1]]:
            before, prompt = prompts[order[position - 1]], prompts[request]
            while prompt[: common + 1] == before[: common + 1] and common < len(before):
                common += 1
        assert found.common[position] == common


def contents(part: Any) -> dict[str, Any]:
    """Everything in a plan but the time that it took."""
    found = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, np.ndarray):
            found[field.name] = (value.dtype, value.tolist())
        elif hasattr(value, "__dataclass_fields__"):
            found[field.name] = contents(value)
        elif field.name != "planning_seconds":
            found[field.name] = value
    return found


@thorough
@given(
    prompts=batches(max_prompts=30),
    rounds=ROUNDS,
    page_size=st.sampled_from([1, 2, 16]),
    wide=st.booleans(),
    data=st.data(),
)
def test_plan_from_disk_equals_plan_of_lists(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[list[int]],
    rounds: tuple[int, int],
    page_size: int,
    wide: bool,
    data: st.DataObject,
) -> None:
    count = len(prompts)
    prompts = [[7, *prompt, -5, 300] for prompt in prompts]  # more than one byte differs
    spaces: list[Hashable] | None = data.draw(
        st.none() | st.lists(st.sampled_from("ab"), min_size=count, max_size=count)
    )
    outputs = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=count, max_size=count))
    expected = plan_batch(prompts, page_size, outputs, namespaces=spaces)
    table = table_of(prompts, np.int64 if wide else np.int32)
    if prompts:  # nothing cannot be mapped
        table = on_disk(table, tmp_path_factory.getbasetemp() / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        small_rounds(patch, *rounds)
        plan = plan_batch(table, page_size, outputs, namespaces=spaces)
    assert contents(plan) == contents(expected)


def timed_plan(table: TokenTable, seconds: float, **options: Any) -> BatchPlan:
    started = time.perf_counter()
    plan = plan_batch(table, **options)
    assert time.perf_counter() - started < seconds
    return plan


def test_many_equal_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_rounds(monkeypatch, 1 << 17, 16)
    count, length = 100_000, 50
    table = TokenTable(np.ones(count * length, np.int32), np.arange(count + 1) * length)
    plan = timed_plan(table, 10)
    assert plan.tree.depth.tolist() == [0, length]
    assert plan.groups.size.tolist() == [count]
    assert plan.order.tolist() == list(range(count))


def test_prompts_each_of_which_begins_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    small_rounds(monkeypatch, 1 << 17, 16)
    lens = np.arange(1, 3001)
    plan = timed_plan(TokenTable(np.zeros(lens.sum(), np.int32), np.cumsum([0, *lens])), 10)
    assert plan.tree.depth.tolist() == list(range(3001))


def test_prompts_of_which_one_leaves_the_others_at_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_rounds(monkeypatch, 1 << 17, 16)
    count = 2000
    tokens = np.triu(np.ones((count, count), np.int32))
    plan = timed_plan(TokenTable(tokens.ravel(), np.arange(count + 1) * count), 10)
    assert plan.tree.num_nodes == 2 * count - 1
    assert plan.report.distinct_tokens == count - 1 + count * (count + 1) // 2


def test_one_group_with_a_long_prefix_and_an_enormous_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_rounds(monkeypatch, 1 << 17, 16)
    rng = np.random.default_rng(0)
    head = rng.integers(0, 9, 5_000, np.int32)
    prompts = [np.append(head, np.int32(own)) for own in rng.permutation(600)]
    prompts += [np.append(head, np.full(5_000_000, 700 + last, np.int32)) for last in (0, 0, 1)]
    prompts[-2][-1] = 9
    table = TokenTable(np.concatenate(prompts), np.cumsum([0, *map(len, prompts)]))
    plan = timed_plan(table, 10)
    assert plan.shared_len.tolist() == [5_000] * 600 + [5_004_999] * 2 + [5_000]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.ones(6), "prompt 0 has dtype float64"),
        (np.array([1, 1, 1, 1, 2**63, 1], np.uint64), "prompt 2 has a token id of 2\\*\\*63"),
    ],
)
def test_bad_tokens_of_a_table(tokens: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_batch(TokenTable(tokens, np.array([0, 2, 4, 6])))


def test_ids_that_only_int64_holds() -> None:
    ids = [2**63 - 1, 5, 2**63 - 1, 6, 2**31, 5]
    offsets = np.array([0, 2, 4, 6])
    assert plan_batch(TokenTable(np.array(ids, np.uint64), offsets)).shared_len.tolist() == [
        1,
        1,
        0,
    ]


def peak_bytes(table: TokenTable) -> int:
    """What planning allocates at most, beside the table; mapped files are not in it."""
    tracemalloc.start()
    try:
        plan_batch(table)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of each prompt is common to eight. Rounds are a 64th of what they are otherwise."""
    small_rounds(monkeypatch, sorting.ROUND_TOKENS // 64, 16)
    rng = np.random.default_rng(0)
    count, peaks = 2_000, []
    for length in (1_000, 8_000):
        tokens = rng.integers(0, 128_000, (count, length), np.int32)
        tokens[:, : length // 2] = np.repeat(tokens[::8, : length // 2], 8, axis=0)
        table = TokenTable(tokens.ravel(), np.arange(count + 1) * length)
        table = on_disk(table, tmp_path / str(length))
        del tokens
        peaks.append(peak_bytes(table))
    assert max(peaks) < BYTES_PER_REQUEST * count + BYTES_AT_ONCE // 32
    assert peaks[1] < peaks[0] * 1.2


@pytest.mark.parametrize("shape", ["leaves", "pairs", "binary"])
def test_memory_per_request(monkeypatch: pytest.MonkeyPatch, shape: str, tmp_path: Path) -> None:
    """A binary tree has the most nodes that a batch can have, and the most inner ones."""
    count = 1 << 16
    small_rounds(monkeypatch, 1 << 16, 16)
    rng = np.random.default_rng(0)
    if shape == "binary":
        tokens = ((rng.permutation(count)[:, None] >> np.arange(16)) & 1).astype(np.int32)
    else:
        tokens = rng.integers(0, 2**31, (count, 16), np.int32)
        if shape == "pairs":
            tokens[::2, :8] = tokens[1::2, :8]
    table = TokenTable(tokens.ravel(), np.arange(count + 1) * 16)
    assert peak_bytes(on_disk(table, tmp_path / "tokens")) < BYTES_PER_REQUEST * count
