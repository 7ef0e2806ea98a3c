"""Milliseconds a layer of decode with a sliding window: --batchllm's kernel, beside fa3's.

    python benchmark/bench_windows.py --out FILE      on a Hopper GPU

Heads as Gemma-3-12b has them (16 on 8 of 256), bf16, with its window of 1,024 tokens and without.
Both are captured in a CUDA graph, each layer with a cache of its own, and both are compared with
the reference. The floor is the bytes of the tokens that anyone sees, each read once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from attention_contenders import Attention, attention_of, make_fa3, make_list
from attention_shapes import BYTES_PER_MS, Groups, Inputs, make_inputs, uniform
from bench_attention import check, step_ms
from results_file import ResultFile
from sglang_batchllm.attention.fused import FusedDecode, choose_configs

HEADS, KV_HEADS, DIM = 16, 8, 256
WINDOW = 1024
TOKEN_BYTES = KV_HEADS * DIM * 4

SHAPES: dict[str, Groups] = {
    "50x16, 2000, 250": uniform(50, 16, 2000, 250),
    "40x16, 4000, 200": uniform(40, 16, 4000, 200),
    "30x4, 2000, 250": uniform(30, 4, 2000, 250),
    "32x16, 2000, 1250": uniform(32, 16, 2000, 1250),
    "256 singletons of 2250": uniform(256, 1, 0, 2250),
}


def make_wide_inputs(groups: Groups) -> Inputs:
    """Of the heads above, where `attention_shapes` has others."""
    inputs = make_inputs(groups)
    slots = inputs.caches[0][0].shape[0]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    return replace(
        inputs,
        q=random(inputs.q.shape[0], HEADS, DIM),
        caches=[(random(slots, KV_HEADS, DIM), random(slots, KV_HEADS, DIM)) for _ in range(2)],
    )


def floor_ms(groups: Groups, window: int | None) -> float:
    tokens = 0
    for prefix, suffixes in groups:
        seen = [min(prefix + own, window or prefix + own) for own in suffixes]
        pairs = list(zip(seen, suffixes, strict=True))
        tokens += sum(min(n, own) for n, own in pairs) + max(max(n - own, 0) for n, own in pairs)
    return tokens * TOKEN_BYTES / BYTES_PER_MS


def make_ours(inputs: Inputs, window: int | None) -> tuple[Callable[[], None], Attention]:
    memory = torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor
    configs = choose_configs(torch.bfloat16, DIM, HEADS // KV_HEADS, memory)
    work, build = make_list(inputs, configs, KV_HEADS, window=window)
    fused = FusedDecode(configs, work, HEADS, KV_HEADS, DIM, torch.bfloat16, "cuda")
    return build, attention_of(fused, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("case", "window"))
    for name, groups in SHAPES.items():
        inputs = make_wide_inputs(groups)
        for window in (WINDOW, None):
            once, ours = make_ours(inputs, window)
            once()
            error = check(ours, inputs, window=window)
            milliseconds = step_ms(once, ours, inputs)
            _, fa3 = make_fa3(inputs, window)
            row = file.add(
                {
                    "case": name,
                    "window": window,
                    "unit": "ms per layer",
                    "floor": floor_ms(groups, window),
                    "ours": milliseconds,
                    "error": error,
                    "fa3 error": check(fa3, inputs, window=window),
                    "fa3": step_ms(None, fa3, inputs),
                }
            )
            print(
                f"{name:24} window {window}  ours {row['ours']:7.3f}  fa3 {row['fa3']:7.3f}  "
                f"ratio {row['fa3'] / row['ours']:5.2f}  floor {row['floor']:6.3f}  "
                f"errors {row['error']:.1e} {row['fa3 error']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
