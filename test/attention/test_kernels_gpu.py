"""The compiled kernels on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import Batch, Path, make_batch, make_fused, make_tree_batch, relative_error, run
from sglang_batchllm.attention.fused import FusedDecode, choose_configs

pytestmark = pytest.mark.gpu

RAGGED = [(700, [1, 7, 300, 2, 65]), (0, [900]), (33, [9]), (1030, [3] * 40), (0, [1, 330])]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def fused_for(batch: Batch, max_batch: int | None = None, window: int | None = None) -> FusedDecode:
    heads, key_dim = batch.q.shape[1:]
    kv_heads, head_dim = batch.v_cache.shape[1:]
    card = torch.cuda.get_device_properties(0)
    memory = card.shared_memory_per_multiprocessor
    configs = choose_configs(
        batch.q.dtype, head_dim, heads // kv_heads, memory, rope_dim=key_dim - head_dim
    )
    programs = [card.multi_processor_count * config.programs_per_sm for config in configs]
    return make_fused(batch, configs, *programs, max_batch=max_batch, window=window)


def error_of(batch: Batch, **kwargs: object) -> float:
    return relative_error(run(fused_for(batch), batch, **kwargs), batch.reference(**kwargs))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 63, 64, 65, 257, 2000]),
            st.lists(st.integers(1, 300), min_size=1, max_size=40),
        ),
        min_size=1,
        max_size=6,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    padding=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)
def test_random_ragged_batches(
    groups: list[tuple[int, list[int]]], dtype: torch.dtype, padding: int, seed: int
) -> None:
    batch = make_batch(groups, 2, 4, 64, dtype, device="cuda", seed=seed, padding=padding)
    assert error_of(batch) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_kv_heads", "ratio"), [(8, 4), (4, 1), (1, 7), (2, 16)])
def test_head_shapes(dtype: torch.dtype, head_dim: int, num_kv_heads: int, ratio: int) -> None:
    batch = make_batch(RAGGED, num_kv_heads, ratio, head_dim, dtype, device="cuda")
    assert error_of(batch) < LIMITS[dtype]


@pytest.mark.parametrize("ratio", [32, 71])
def test_many_query_heads_on_one_kv_head(ratio: int) -> None:
    batch = make_batch(RAGGED, 1, ratio, 64, torch.bfloat16, device="cuda")
    assert error_of(batch) < 1e-2


@pytest.mark.parametrize("ratio", [10, 16, 32])
def test_latent_attention(ratio: int) -> None:
    batch = make_batch(RAGGED, 1, ratio, 512, torch.bfloat16, device="cuda", rope_dim=64)
    assert error_of(batch) < 1e-2


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(kv_dtype: torch.dtype) -> None:
    batch = make_batch(RAGGED, 8, 4, 128, torch.bfloat16, kv_dtype, device="cuda")
    out = run(fused_for(batch), batch, k_scale=0.5, v_scale=2.0)
    batch.k_cache = batch.k_cache.double() * 0.5
    batch.v_cache = batch.v_cache.double() * 2.0
    assert relative_error(out, batch.reference()) < 1e-2


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages(page_size: int) -> None:
    batch = make_batch(RAGGED, 8, 4, 128, torch.bfloat16, device="cuda", page_size=page_size)
    assert error_of(batch) < 1e-2


def test_softcap_and_sinks() -> None:
    batch = make_batch(RAGGED, 8, 4, 64, torch.bfloat16, device="cuda")
    sinks = torch.randn(32, device="cuda")
    assert error_of(batch, softcap=5.0, sinks=sinks) < 1e-2


@pytest.mark.parametrize(("head_dim", "ratio"), [(128, 4), (256, 2)])
@pytest.mark.parametrize("window", [64, 500, 1024])
def test_windows(window: int, head_dim: int, ratio: int) -> None:
    groups = [(1030, [3, 90, 200, 1, 63] * 40), (2000, [1, 7, 300, 2, 65, 1100]), (0, [900, 5])]
    batch = make_batch(groups, 4, ratio, head_dim, torch.bfloat16, device="cuda")
    out = run(fused_for(batch, window=window), batch)
    assert relative_error(out, batch.reference(window=window)) < LIMITS[torch.bfloat16]


def test_one_group_of_300_and_4096_requests() -> None:
    batch = make_batch([(500, [3] * 300)], 8, 4, 128, torch.bfloat16, device="cuda")
    assert error_of(batch) < 1e-2
    groups = [(20, [2] * 8)] * 448 + [(0, [5])] * 512
    batch = make_batch(groups, 1, 4, 64, torch.bfloat16, device="cuda")
    assert error_of(batch) < 1e-2


def test_strided_queries() -> None:
    batch = make_batch(RAGGED, 8, 4, 64, torch.bfloat16, device="cuda")
    heads = batch.q.shape[1]
    wide = torch.full((batch.q.shape[0], heads + 16, 64), torch.nan, device="cuda").bfloat16()
    wide[:, :heads] = batch.q
    fused = fused_for(batch)
    expected = run(fused, batch)
    out = torch.empty_like(batch.q)
    q = wide[:, :heads]
    fused(q, batch.k_cache, batch.v_cache, out, batch.req_to_token, batch.scale)
    assert torch.equal(out, expected)


def test_graph_serves_any_groups() -> None:
    """Captured with no group at all, replayed with others, work list built outside the graph."""
    batch = make_batch(RAGGED, 8, 4, 128, torch.bfloat16, device="cuda", padding=3)
    fused = fused_for(batch, max_batch=triton.next_power_of_2(batch.q.shape[0]))
    static = Batch(**{name: value for name, value in vars(batch).items()})
    static.group_id = torch.zeros_like(batch.group_id)
    static.rows, static.seq_lens = batch.rows.clone(), torch.ones_like(batch.seq_lens)
    out = run(fused, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(static.q, static.k_cache, static.v_cache, out, static.req_to_token, static.scale)
    for seq_lens, groups in ((static.seq_lens, static.group_id), (batch.seq_lens, batch.group_id)):
        out.fill_(torch.nan)
        fused.work.build(
            batch.rows, seq_lens, groups, batch.prefix_len, batch.req_to_token, batch.levels
        )
        graph.replay()
        batch.seq_lens = seq_lens
        assert relative_error(out, batch.reference()) < 1e-2


def test_trees() -> None:
    paths: list[Path] = [
        ([("system", 600), (i // 40, 300), (100 + i // 10, 70), (1000 + i // 2, 200)], 1 + i % 200)
        for i in range(300)
    ]
    paths += [([("system", 600)], 90)] * 9 + [([], 700)] * 3
    batch = make_tree_batch(paths, 8, 4, 128, torch.bfloat16, device="cuda", padding=3)
    fused = fused_for(batch)
    for stay in (312, 150, 40, 7):
        rest = replace(
            batch, q=batch.q[:stay], rows=batch.rows[:stay], seq_lens=batch.seq_lens[:stay]
        )
        assert relative_error(run(fused, rest), rest.reference()) < 1e-2
        if stay == len(paths):
            assert int(fused.work.part_count.max()) > 2, "one node is read, at most"


def test_repeated_runs_agree() -> None:
    batch = make_batch(RAGGED, 8, 4, 128, torch.bfloat16, device="cuda")
    fused = fused_for(batch)
    first = run(fused, batch)
    for _ in range(20):
        assert torch.equal(run(fused, batch), first)
