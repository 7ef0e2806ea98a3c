"""Time decode attention over prefix trees, one layer of Llama-3.1-8B's shape: ours, ours with one
shared node a request, and fa3.

    python benchmark/bench_trees.py --out benchmark/results/trees.json     on a GPU host

Times are those of `bench_attention.py`. The floor is unique KV bytes at the copy rate that is
measured first. `wanted` is 1.1 times what FastTree (MLSys'25) reached on an H100, or more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from attention_contenders import make_fa3, make_ours
from attention_shapes import DIM, KV_HEADS, TREES, Inputs, make_tree_inputs, tree
from bench_attention import check, step_ms
from results_file import ResultFile


def copy_rate() -> float:
    """Bytes a millisecond, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    begin.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 10 * 2 * source.numel() / begin.elapsed_time(end)


def ours_ms(inputs: Inputs, **tuning: int) -> tuple[float, float]:
    """Milliseconds a layer, and the relative error."""
    once, attention = make_ours(inputs, **tuning)
    once()
    error = check(attention, inputs)
    assert error < 1e-2, f"wrong: relative error {error:.1e}"
    return step_ms(once, attention, inputs), error


def list_ms(inputs: Inputs) -> float:
    """Milliseconds of building the work list, on the GPU."""
    once, _ = make_ours(inputs)
    once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            once()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tune", action="store_true", help="other settings of the list, too")
    parser.add_argument("--trees", nargs="*", default=list(TREES), choices=list(TREES))
    options = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_rate()
    file = ResultFile(options.out, key=["case"])
    for name in options.trees:
        nodes, tokens, wanted = TREES[name]
        inputs = make_tree_inputs(tree(nodes, tokens))
        row = {"floor": inputs.unique_tokens * KV_HEADS * DIM * 4 / rate, "wanted": wanted}
        row["ours"], row["error"] = ours_ms(inputs)
        row["one level"], _ = ours_ms(make_tree_inputs(tree(nodes, tokens), levels=1))
        row["work list"] = list_ms(inputs)
        _, fa3 = make_fa3(inputs)
        row["fa3"] = step_ms(None, fa3, inputs)
        row["ratio"] = row["fa3"] / row["ours"]
        if options.tune:
            for parts in (4, 8, 32):
                row[f"part_tokens {parts}"], _ = ours_ms(inputs, part_tokens=parts)
            for wide in (96, 160, 320):
                row[f"wide_tokens {wide}"], _ = ours_ms(inputs, wide_tokens=wide)
        file.add({"case": name, "unit": "ms per layer", "copy bytes per ms": rate, **row})
        print(
            f"{name:30}", " ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True
        )


if __name__ == "__main__":
    main()
