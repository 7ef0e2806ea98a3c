"""Time decode attention, one layer of Llama-3.1-8B's shape, of this package and of its rivals.

    python benchmark/bench_attention.py --out benchmark/results     on a GPU host

`draw.py` makes the figure.

Every time is that of a step of 32 layers in one CUDA graph, over 32. Layers go round several KV
caches, each many times the L2, and slots are random, so that nothing is served from a cache that a
real step would miss. Ours counts its work list (once a step) and its merge; the rivals' plans and
page tables are not counted. The floor is unique KV bytes at 4.3 TB/s, the copy rate of an H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from sglang_batchllm.attention.fused import FusedDecode, choose_config
from sglang_batchllm.attention.reference import reference_decode
from sglang_batchllm.attention.worklist import MIN_SAVED_TOKENS, WorkList, WorkListConfig

HEADS, KV_HEADS, DIM = 32, 8, 128
LAYERS = 32
BYTES_PER_MS = 4.3e9
Groups = list[tuple[int, list[int]]]
"""(prefix tokens, suffix tokens of each member); prefix 0 is no group."""
Attention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "32x16, 2000, 250": (32, 16, 2000, 250),
    "8x64, 2000, 250": (8, 64, 2000, 250),
    "128x4, 2000, 250": (128, 4, 2000, 250),
    "64x16, 1000, 200": (64, 16, 1000, 200),
    "16x32, 8000, 300": (16, 32, 8000, 300),
    "512 singletons of 2250": (512, 1, 0, 2250),
}
TARGET_RATIOS = dict(zip(SHAPES, (3.2, 3.7, 1.9, 2.6, 6.5, 1 / 1.02), strict=True))


def uniform(groups: int, members: int, prefix: int, suffix: int) -> Groups:
    return [(prefix, [suffix] * members) for _ in range(groups)]


@dataclass
class Inputs:
    """One step's batch on the GPU, members of a group next to each other, slots random.

    That order, the runtime's, is the best one for flat kernels: neighbours share the L2.
    """

    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    req_to_token: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    group_id: torch.Tensor
    prefix_len: torch.Tensor
    members: list[list[int]]
    prefixes: list[int]
    unique_tokens: int

    @property
    def floor_ms(self) -> float:
        return self.unique_tokens * KV_HEADS * DIM * 4 / BYTES_PER_MS

    @property
    def scale(self) -> float:
        return DIM**-0.5


def make_inputs(groups: Groups, seed: int = 0) -> Inputs:
    gen = torch.Generator().manual_seed(seed)
    batch = sum(len(suffixes) for _, suffixes in groups)
    unique = sum(prefix + sum(suffixes) for prefix, suffixes in groups)
    context = max(prefix + max(suffixes) for prefix, suffixes in groups)
    slots = (torch.randperm(unique, generator=gen) + 1).int()
    req_to_token = torch.zeros((batch + 1, context), dtype=torch.int32)
    group_id = torch.zeros(batch + 1, dtype=torch.int32)
    prefix_len = torch.zeros(batch + 1, dtype=torch.int32)
    seq_lens = torch.zeros(batch + 1, dtype=torch.int64)
    members: list[list[int]] = []
    row, at = 1, 0
    for number, (prefix, suffixes) in enumerate(groups, start=1):
        shared = slots[at : at + prefix]
        at += prefix
        members.append(list(range(row, row + len(suffixes))))
        for suffix in suffixes:
            req_to_token[row, :prefix] = shared
            req_to_token[row, prefix : prefix + suffix] = slots[at : at + suffix]
            at += suffix
            seq_lens[row] = prefix + suffix
            if prefix and len(suffixes) > 1:
                group_id[row], prefix_len[row] = number, prefix
            row += 1
    rows = torch.arange(batch) + 1
    position = torch.zeros(batch + 1, dtype=torch.long)
    position[rows] = torch.arange(batch)
    shape = (unique + 64, KV_HEADS, DIM)
    copies = max(2, -(-(1 << 30) // (unique * KV_HEADS * DIM * 4)))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    return Inputs(
        random(batch, HEADS, DIM),
        [(random(*shape), random(*shape)) for _ in range(min(copies, 8))],
        req_to_token.cuda(),
        rows.cuda(),
        seq_lens[rows].cuda(),
        group_id.cuda(),
        prefix_len.cuda(),
        [position[m].tolist() for m in members],
        [prefix for prefix, _ in groups],
        unique,
    )


# -- contenders: each returns (once-a-step work or None, attention of one layer) ---------------


def make_ours(
    inputs: Inputs, min_saved_tokens: int = MIN_SAVED_TOKENS
) -> tuple[Callable[[], None], Attention]:
    config = choose_config(torch.bfloat16, DIM, HEADS // KV_HEADS)
    lanes = HEADS // KV_HEADS
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    work = WorkList(
        WorkListConfig(
            KV_HEADS,
            config.block_m_small // lanes,
            config.block_m_large // lanes,
            sms * config.programs_per_sm,
            min_saved_tokens,
        ),
        max(inputs.q.shape[0], 1024),
        max(inputs.req_to_token.shape[0], 2048),
        inputs.unique_tokens,
        "cuda",
    )
    fused = FusedDecode(config, work, HEADS, KV_HEADS, DIM, torch.bfloat16, "cuda")
    out = torch.empty_like(inputs.q)

    def build() -> None:
        work.build(
            inputs.rows,
            inputs.seq_lens,
            inputs.group_id,
            inputs.prefix_len,
            inputs.req_to_token,
        )

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fused(inputs.q, k, v, out, inputs.req_to_token, inputs.scale)

    return build, attention


def make_fa3(inputs: Inputs) -> tuple[None, Attention]:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

    batch = inputs.q.shape[0]
    page_table = inputs.req_to_token[inputs.rows].contiguous()
    lengths = inputs.seq_lens.int()
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=page_table.shape[1],
        num_heads=HEADS,
        num_heads_k=KV_HEADS,
        headdim=DIM,
        cache_seqlens=lengths,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=cu_seqlens_q,
        page_size=1,
        causal=True,
    )

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_with_kvcache(
            q=inputs.q,
            k_cache=k[:, None],
            v_cache=v[:, None],
            page_table=page_table,
            cache_seqlens=lengths,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=1,
            softmax_scale=inputs.scale,
            causal=True,
            scheduler_metadata=metadata,
        )

    return None, attention


def _flat_indices(inputs: Inputs, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """indptr int32 [batch + 1] and slots int32 of the requests in ``order``."""
    lengths = inputs.seq_lens[order].int()
    indptr = torch.zeros(len(order) + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = lengths.cumsum(0)
    table = inputs.req_to_token[inputs.rows[order]]
    inside = torch.arange(table.shape[1], device="cuda")[None] < lengths[:, None]
    return indptr, table[inside].contiguous()


def make_flashinfer(inputs: Inputs) -> tuple[None, Attention]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    indptr, indices = _flat_indices(inputs, list(range(inputs.q.shape[0])))
    workspace = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    last = torch.ones(inputs.q.shape[0], dtype=torch.int32, device="cuda")
    wrapper.plan(
        indptr,
        indices,
        last,
        HEADS,
        KV_HEADS,
        DIM,
        1,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return wrapper.run(inputs.q, (k[:, None], v[:, None]))

    return None, attention


def make_cascade(inputs: Inputs) -> tuple[None, Attention]:
    from flashinfer import MultiLevelCascadeAttentionWrapper

    order = [i for members in inputs.members for i in members]
    table = inputs.req_to_token[inputs.rows[order]]
    lengths = inputs.seq_lens[order].int()
    counts = torch.tensor([len(m) for m in inputs.members])
    prefix = torch.tensor(inputs.prefixes)
    device = "cuda"

    def pointers(values: torch.Tensor) -> torch.Tensor:
        start = torch.zeros(1, dtype=torch.int64)
        return torch.cat([start, values.cpu().cumsum(0)]).int().to(device)

    first = (counts.cumsum(0) - counts).to(device)
    own_prefix = prefix.repeat_interleave(counts).to(device)
    place = torch.arange(table.shape[1], device=device)[None]
    shared = table[first][place < prefix.to(device)[:, None]]
    own = table[(place >= own_prefix[:, None]) & (place < lengths[:, None])]
    batch = len(order)
    workspace = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    wrapper.plan(
        [pointers(counts), torch.arange(batch + 1, dtype=torch.int32, device=device)],
        [pointers(prefix), pointers(lengths - own_prefix)],
        [shared, own],
        [ones[: len(counts)], ones],
        HEADS,
        KV_HEADS,
        DIM,
        1,
        q_data_type="bfloat16",
    )
    queries = inputs.q[order].contiguous()
    back = torch.empty(batch, dtype=torch.long, device=device)
    back[order] = torch.arange(batch, device=device)

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = wrapper.run(queries, (k[:, None], v[:, None]))
        return out if torch.cuda.is_current_stream_capturing() else out[back]

    return None, attention


def make_sglang_triton(inputs: Inputs) -> tuple[None, Attention]:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    batch = inputs.q.shape[0]
    indptr, indices = _flat_indices(inputs, list(range(batch)))
    most = 8  # SGLang's default for triton_attention_num_kv_splits
    splits = torch.empty(batch, dtype=torch.int32, device="cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    get_num_kv_splits_triton[(1,)](
        splits,
        inputs.seq_lens,
        batch,
        1,
        HEADS,
        KV_HEADS,
        most,
        sms,
        MAX_NUM_SEQ=max(256, triton.next_power_of_2(batch)),
    )
    logits = torch.empty((batch, HEADS, most, DIM), dtype=torch.float32, device="cuda")
    lse = torch.empty((batch, HEADS, most), dtype=torch.float32, device="cuda")
    out = torch.empty_like(inputs.q)
    indices = indices.long()

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        decode_attention_fwd(
            inputs.q,
            k,
            v,
            out,
            indptr,
            indices,
            logits,
            lse,
            splits,
            most,
            inputs.scale,
            1.0,
            1.0,
        )
        return out

    return None, attention


CONTENDERS: dict[str, Callable[[Inputs], tuple[Callable[[], None] | None, Attention]]] = {
    "ours": make_ours,
    "fa3": make_fa3,
    "flashinfer": make_flashinfer,
    "cascade": make_cascade,
    "sglang-triton": make_sglang_triton,
}

SWEPT = ("ours", "fa3")


# -- measuring ------------------------------------------------------------------------------


def check(attention: Attention, inputs: Inputs, sample: int = 16) -> float:
    """Relative error of a sample of requests against float64."""
    out = attention(*inputs.caches[-1])
    which = torch.randperm(inputs.q.shape[0])[:sample].cuda()
    reference = reference_decode(
        inputs.q[which],
        *inputs.caches[-1],
        inputs.req_to_token,
        inputs.rows[which],
        inputs.seq_lens[which],
        inputs.scale,
    )
    return float((out[which].double() - reference).norm() / reference.norm())


def step_ms(once: Callable[[], None] | None, attention: Attention, inputs: Inputs) -> float:
    """Milliseconds a layer: the median of ten replays of a captured step of LAYERS layers."""

    def step() -> None:
        if once is not None:
            once()
        for layer in range(LAYERS):
            attention(*inputs.caches[layer % len(inputs.caches)])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for replay in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) / LAYERS)
    return statistics.median(times)


def measure(name: str, groups: Groups) -> dict[str, object]:
    inputs = make_inputs(groups)
    row: dict[str, object] = {"requests": inputs.q.shape[0], "floor": inputs.floor_ms}
    once, attention = CONTENDERS[name](inputs)
    if once is not None:
        once()
    row[f"{name} error"] = check(attention, inputs)
    row[name] = step_ms(once, attention, inputs)
    return row


def measure_rule(members: int, prefix: int) -> dict[str, object]:
    """What sharing costs or gains for small groups: forced on and forced off."""
    inputs = make_inputs(uniform(512 // members, members, prefix, 250))
    row: dict[str, object] = {"members": members, "prefix": prefix}
    for name, least in (("shared", 1), ("not shared", 1 << 30)):
        once, attention = make_ours(inputs, least)
        once()
        row[name] = step_ms(once, attention, inputs)
    return row


def measure_host(batch: int) -> dict[str, float]:
    """Host and device time of building the work list, once a step."""
    inputs = make_inputs(uniform(batch // 16, 16, 64, 16))
    once, _ = make_ours(inputs)
    once()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        once()
    host = (time.perf_counter() - start) / 50 * 1e3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(50):
            once()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return {"requests": batch, "host ms": host, "device ms": begin.elapsed_time(end) / 50}


def ragged_groups(seed: int = 0) -> Groups:
    """A batch as decoding leaves it: few large groups, many small ones, suffixes of any length."""
    gen = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(low * (high / low) ** float(torch.rand(1, generator=gen)))

    groups = [
        (between(200, 8000), [between(50, 500) for _ in range(between(1, 65))]) for _ in range(48)
    ]
    return groups + [(0, [between(100, 2000)]) for _ in range(32)]


def sweeps() -> dict[str, list[tuple[int, Groups]]]:
    return {
        "sharing degree": [
            (m, uniform(512 // m, m, 2000, 250)) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        ],
        "prefix tokens": [
            (p, uniform(16, 16, p, 250)) for p in (0, 250, 1000, 2000, 4000, 8000, 16000, 32000)
        ],
        "suffix tokens": [(s, uniform(32, 16, 2000, s)) for s in (1, 16, 64, 250, 500, 1000, 2000)],
    }


def print_shapes(table: dict[str, dict[str, Any]]) -> None:
    names = list(CONTENDERS)
    print(f"{'groups x members, prefix, suffix':34}" + "".join(f"{n:>15}" for n in names), end="")
    print(f"{'floor':>9}{'fa3/ours':>10}{'wanted':>8}")
    for shape, row in table.items():
        cells = "".join(
            f"{row[n]:15.3f}" if isinstance(row.get(n), float) else f"{'-':>15}" for n in names
        )
        ours, fa3 = row.get("ours"), row.get("fa3")
        both = isinstance(ours, float) and isinstance(fa3, float)
        ratio = f"{fa3 / ours:10.2f}" if both else f"{'-':>10}"
        wanted = f"{TARGET_RATIOS[shape]:8.2f}" if shape in TARGET_RATIOS else f"{'':>8}"
        print(f"{shape:34}{cells}{row['floor']:9.3f}{ratio}{wanted}")
        for n in names:
            error = row.get(f"{n} error")
            if isinstance(error, float) and not error < 1e-2:
                print(f"    WRONG: {n} has relative error {error:.2e}")


def measure_contender(name: str, shapes_only: bool) -> dict[str, object]:
    """All measurements of one contender, in this process."""
    batches = {shape: uniform(*sizes) for shape, sizes in SHAPES.items()}
    batches["ragged, 80 groups"] = ragged_groups()
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "shapes": {
            shape: measure(name, groups)
            for shape, groups in batches.items()
            # flashinfer's cascade wrapper crashes where a group has no prefix.
            if name != "cascade" or all(prefix > 0 for prefix, _ in groups)
        },
    }
    if name in SWEPT and not shapes_only:
        result["sweeps"] = {
            sweep: [{"x": x, **measure(name, groups)} for x, groups in points]
            for sweep, points in sweeps().items()
        }
    if name == "ours" and not shapes_only:
        result["work list"] = [measure_host(n) for n in (256, 1024, 2048, 4096)]
        result["rule"] = [measure_rule(m, p) for m in (2, 4, 16) for p in (16, 64, 128, 256, 512)]
    return result


def in_a_process(name: str, shapes_only: bool) -> dict[str, Any]:
    """One contender in a process of its own: a rival that fails must not take the others along."""
    command = [sys.executable, __file__, "--contender", name]
    done = subprocess.run(command + ["--shapes-only"] * shapes_only, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{name} failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:300]}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def merge(into: Any, other: Any) -> Any:
    """Join the contenders' tables: dicts by key, lists row by row."""
    if isinstance(into, dict) and isinstance(other, dict):
        return {k: merge(into.get(k), other.get(k)) for k in {**into, **other}}
    if isinstance(into, list) and isinstance(other, list):
        return [merge(x, y) for x, y in zip(into, other, strict=True)]
    return other if into is None else into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmark/results"))
    parser.add_argument("--shapes-only", action="store_true", help="leave the sweeps out")
    parser.add_argument("--contender", choices=list(CONTENDERS), help="one, its JSON to stdout")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.contender:
        print(json.dumps(measure_contender(options.contender, options.shapes_only)))
        return
    result: Any = {"unit": "ms per layer", "torch": torch.__version__}
    result["triton"] = triton.__version__
    for name in CONTENDERS:
        result = merge(result, in_a_process(name, options.shapes_only))
    print_shapes(result["shapes"])
    for row in result.get("work list", []) + result.get("rule", []):
        print({k: round(v, 4) for k, v in row.items()})
    for sweep, rows in result.get("sweeps", {}).items():
        for row in rows:
            print(sweep, {k: round(row[k], 4) for k in ("x", *SWEPT, "floor") if k in row})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
