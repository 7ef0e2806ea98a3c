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
from pathlib import Path
from typing import Any

import torch
import triton

from attention_contenders import CONTENDERS, Attention, make_ours
from attention_shapes import SHAPES, Groups, Inputs, make_inputs, ragged_groups, sweeps, uniform
from sglang_batchllm.attention.reference import reference_decode

LAYERS = 32
TARGET_RATIOS = dict(zip(SHAPES, (3.2, 3.7, 1.9, 2.6, 6.5, 1 / 1.02), strict=True))
SWEPT = ("ours", "fa3")


def check(
    attention: Attention, inputs: Inputs, sample: int = 16, window: int | None = None
) -> float:
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
        window=window,
    )
    return float((out[which].double() - reference).norm() / reference.norm())


def step_ms(once: Callable[[], None] | None, attention: Attention, inputs: Inputs) -> float:
    """Milliseconds a layer: the median of 30 replays of a captured step of LAYERS layers."""

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
    for replay in range(32):
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
        once, attention = make_ours(inputs, min_saved_tokens=least)
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
    for number in (4, 16, 64):  # the tail of a batch
        batches[f"{number} singletons of 3000"] = uniform(number, 1, 0, 3000)
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
