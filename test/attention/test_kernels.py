"""The kernels and their work list on CPU tensors, under Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cases import (
    Batch,
    Path,
    make_batch,
    make_fused,
    make_tree_batch,
    relative_error,
    run,
)
from sglang_batchllm.attention.fused import FusedDecode
from sglang_batchllm.attention.groups import LEVELS

RAGGED = [(70, [1, 7, 30, 2, 65]), (0, [90]), (33, [9]), (16, [3, 3]), (0, [1, 33])]

# An example takes up to two seconds in the interpreter, so a failure is printed as it was drawn.
WITHOUT_SHRINKING = [phase for phase in Phase if phase is not Phase.shrink]

groups_strategy = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 15, 16, 17, 40, 100]),
        st.lists(st.integers(1, 40), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=6, phases=WITHOUT_SHRINKING)
@given(groups=groups_strategy, padding=st.sampled_from([0, 3]), seed=st.integers(0, 99))
def test_random_ragged_batches(
    groups: list[tuple[int, list[int]]], padding: int, seed: int
) -> None:
    batch = make_batch(groups, seed=seed, padding=padding)
    assert relative_error(run(make_fused(batch), batch), batch.reference()) < 1e-5


@st.composite
def trees(draw: st.DrawFn) -> list[Path]:
    """Requests in a random tree of up to 8 levels: each goes down from the one before it."""
    paths: list[Path] = []
    path: list[tuple[int, int]] = []
    names = itertools.count()
    for _ in range(draw(st.integers(1, 20))):
        path = path[: draw(st.integers(0, len(path)))]
        for _ in range(draw(st.integers(0, LEVELS - len(path)))):
            path.append((next(names), draw(st.sampled_from([1, 15, 17, 40]))))
        paths.append((list(path), draw(st.integers(1, 30))))
    return paths


@settings(max_examples=5, phases=WITHOUT_SHRINKING)
@given(paths=trees(), saved=st.sampled_from([1, 60]), seed=st.integers(0, 99))
def test_random_trees(paths: list[Path], saved: int, seed: int) -> None:
    batch = make_tree_batch(paths, seed=seed, padding=seed % 3)
    fused = make_fused(batch, min_saved_tokens=saved, part_tokens=seed % 4)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    # Some leave: what is left is read as its own members need it.
    stay = torch.randperm(len(batch.rows))[: max(len(batch.rows) // 2, 1)]
    rest = replace(batch, q=batch.q[stay], rows=batch.rows[stay], seq_lens=batch.seq_lens[stay])
    assert relative_error(run(fused, rest), rest.reference()) < 1e-5


@settings(max_examples=8, phases=WITHOUT_SHRINKING)
@given(paths=trees(), window=st.sampled_from([1, 20, 45, 300]), seed=st.integers(0, 99))
def test_random_windows(paths: list[Path], window: int, seed: int) -> None:
    batch = make_tree_batch(paths, seed=seed, padding=seed % 3)
    fused = make_fused(batch, window=window)
    assert relative_error(run(fused, batch), batch.reference(window=window)) < 1e-5


def test_a_window_is_read_together_where_it_reaches_the_prefix() -> None:
    paths: list[Path] = [([("root", 300), (i // 4, 100)], 20 + i % 4) for i in range(32)]
    paths += [([("root", 300), (0, 100)], 200)]  # its window begins behind both
    batch = make_tree_batch(paths)
    fused = make_fused(batch, window=160, min_saved_tokens=60)
    assert relative_error(run(fused, batch), batch.reference(window=160)) < 1e-5
    shared = [item for item in read_items(fused) if item[0] in (1, 2)]
    # Of the root, the last 40 tokens for the windows that begin first; of each node all 100.
    assert sorted({(row, tokens) for _, row, _, tokens, *_ in shared}) == [(260, 40), (300, 100)]
    own = {first: tokens for kind, _, _, tokens, first, *_ in read_items(fused) if kind in (0, 3)}
    assert sorted(own.values()) == sorted([*[20, 21, 22, 23] * 8, 160])


def test_windows_that_reach_no_prefix_share_nothing() -> None:
    batch = make_batch([(300, [64, 70, 65, 90])])
    fused = make_fused(batch, window=64)
    assert relative_error(run(fused, batch), batch.reference(window=64)) < 1e-5
    assert fused.work.part_count[:4].tolist() == [1] * 4


def read_items(fused: FusedDecode) -> list[list[int]]:
    return fused.work.items[: int(fused.work.header[0])].tolist()


def test_levels_are_read_where_that_saves_reads() -> None:
    paths: list[Path] = [([("root", 300), (i // 4, 100)], 20) for i in range(32)]
    batch = make_tree_batch(paths, num_kv_heads=1, ratio=4)  # a tile of 8 members, or of 4
    fused = make_fused(batch, wide_tokens=0)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    work = fused.work
    items = work.items[: int(work.header[0])]
    # The root by tiles of 8, for the 8 tiles below it; each of those once; and 32 suffixes.
    assert items[items[:, 0] != 0][:, 3].sum() == 4 * 300 + 8 * 100
    assert items[items[:, 0] == 0][:, 3].sum() == 32 * 20
    assert work.part_count[:32].tolist() == [3] * 32
    # Where the root saves too little for its parts it is read with what is below it.
    fused = make_fused(batch, wide_tokens=0, part_tokens=40)
    fused.work.slot_capacity, fused.work.slots = 4000, torch.zeros(4000, dtype=torch.int32)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    items = fused.work.items[: int(fused.work.header[0])]
    assert items[items[:, 0] != 0][:, 3].sum() == 8 * 400


def test_members_beyond_what_the_list_holds_read_less_together() -> None:
    paths: list[Path] = [
        ([("a", 40), ("b", 40), ("c", 40), (i // 16 - 2, 40), (i // 8, 40)], 5) for i in range(32)
    ]
    paths += [([("a", 40), ("b", 40)], 5)] * 9 + [([("a", 40)], 5)] * 9
    batch = make_tree_batch(paths, num_kv_heads=1, ratio=1)
    for members in (0, 33, 60, 150):
        fused = make_fused(batch)
        fused.work.member_capacity = members
        assert relative_error(run(fused, batch), batch.reference()) < 1e-5
        items = fused.work.items[: int(fused.work.header[0])]
        shared = items[(items[:, 0] == 1) | (items[:, 0] == 2)]
        assert bool(len(shared)) == (members > 40)
        assert (shared[:, 4] + shared[:, 5]).max() <= members if len(shared) else True


@pytest.mark.parametrize("ratio", [3, 16])
def test_latent_attention(ratio: int) -> None:
    batch = make_batch(RAGGED, 1, ratio, 32, rope_dim=16, padding=2)
    assert relative_error(run(make_fused(batch), batch), batch.reference()) < 1e-5


@pytest.mark.parametrize(
    ("num_kv_heads", "ratio", "head_dim"), [(2, 1, 16), (1, 3, 80), (1, 7, 16), (8, 4, 16)]
)
def test_head_shapes(num_kv_heads: int, ratio: int, head_dim: int) -> None:
    batch = make_batch(RAGGED[:3], num_kv_heads, ratio, head_dim)
    assert relative_error(run(make_fused(batch), batch), batch.reference()) < 1e-5


def test_half_precision() -> None:
    # The interpreter's dot takes bfloat16 for integers: that dtype is tested on the GPU.
    batch = make_batch(RAGGED[:3], dtype=torch.float16)
    assert relative_error(run(make_fused(batch), batch), batch.reference()) < 1e-2


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages(page_size: int) -> None:
    batch = make_batch(RAGGED[:3], page_size=page_size)
    assert relative_error(run(make_fused(batch), batch), batch.reference()) < 1e-5


def test_softcap_sinks_and_scales() -> None:
    batch = make_batch(RAGGED[:3])
    sinks = torch.randn(4)
    out = run(make_fused(batch), batch, softcap=2.0, sinks=sinks)
    assert relative_error(out, batch.reference(softcap=2.0, sinks=sinks)) < 1e-5
    out = run(make_fused(batch), batch, k_scale=0.5, v_scale=3.0)
    batch.k_cache *= 0.5
    batch.v_cache *= 3.0
    assert relative_error(out, batch.reference()) < 1e-5


def test_long_sequences_are_split_and_large_tiles_used() -> None:
    batch = make_batch([(600, [1] * 40), (0, [700, 1])], num_kv_heads=1)
    fused = make_fused(batch, num_programs=2)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    items = fused.work.items[: int(fused.work.header[0])]
    assert (items[:, 0] == 2).any()
    assert int(fused.work.part_count.max()) > 2


@pytest.mark.parametrize(
    "groups",
    [
        [(0, [1500, 1500, 1400])],
        [(0, [4000])],
        [(900, [300, 200]), (0, [1500, 90])],
        [(600, [300] * 3), (0, [10] * 3)],
    ],
)
def test_few_requests_take_one_item_per_program(groups: list[tuple[int, list[int]]]) -> None:
    batch = make_batch(groups, num_kv_heads=1, padding=1)
    fused = make_fused(batch, num_programs=12)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    items = fused.work.items[: int(fused.work.header[0])]
    assert 4 < len(items) <= 12
    mean = max(256, -(-int(items[:, 3].sum()) // 12))
    assert items[:, 3].max() <= (mean + 63) // 64 * 64 * 5 // 3


def test_one_long_request_among_short_ones_is_still_split() -> None:
    batch = make_batch([(0, [3000] + [20] * 10)], num_kv_heads=1)
    fused = make_fused(batch, num_programs=12)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    assert int(fused.work.part_count.max()) > 8


def test_the_list_is_reused_for_other_batches() -> None:
    first, second = make_batch(RAGGED), make_batch([(50, [4] * 6)], seed=1)
    second.k_cache = torch.cat([second.k_cache, first.k_cache])
    second.v_cache = torch.cat([second.v_cache, first.v_cache])
    fused = make_fused(first, max_batch=16)
    for batch in (first, second, first):
        assert relative_error(run(fused, batch), batch.reference()) < 1e-5


def test_no_tokens_gives_zeros() -> None:
    batch = make_batch([(0, [5, 6])])
    batch.seq_lens[0] = 0
    out = run(make_fused(batch), batch)
    assert (out[0] == 0).all()
    assert relative_error(out[1:], batch.reference()[1:]) < 1e-5


def test_groups_that_do_not_pay_do_not_share() -> None:
    batch = make_batch([(40, [3, 4]), (200, [5, 6])])
    fused = make_fused(batch, min_saved_tokens=100)
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    assert sorted(fused.work.part_count[:4].tolist()) == [1, 1, 2, 2]


def test_groups_beyond_the_slot_snapshot_do_not_share() -> None:
    batch = make_batch([(40, [3, 4]), (200, [5, 6])])
    fused = make_fused(batch)
    fused.work.slot_capacity = 100
    assert relative_error(run(fused, batch), batch.reference()) < 1e-5
    assert sorted(fused.work.part_count[:4].tolist()) == [1, 1, 2, 2]


def test_the_list_covers_every_token_once() -> None:
    batch = make_batch(RAGGED)
    fused = make_fused(batch)
    run(fused, batch)
    work = fused.work
    covered = torch.zeros(len(batch.rows), dtype=torch.long)
    for kind, _, _, tokens, first, members, _, _ in read_items(fused):
        who = [first] if kind in (0, 3) else work.members[first : first + members].tolist()
        covered[who] += tokens
    assert torch.equal(covered, batch.seq_lens)
    parts = [
        range(base, base + count)
        for base, count in zip(work.part_base.tolist(), work.part_count.tolist(), strict=True)
    ]
    used = [part for request in parts[: len(batch.rows)] for part in request]
    assert len(set(used)) == len(used) and max(used) < work.part_capacity


def test_same_result_in_any_batch_order() -> None:
    batch = make_batch(RAGGED)
    out = run(make_fused(batch), batch)
    order = torch.randperm(len(batch.rows))
    other = Batch(**{**vars(batch), "q": batch.q[order], "rows": batch.rows[order]})
    other.seq_lens = batch.seq_lens[order]
    torch.testing.assert_close(run(make_fused(other), other), out[order], rtol=1e-5, atol=1e-6)
