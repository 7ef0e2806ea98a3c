"""Milliseconds a layer of decode over latent KV (MLA): --batchllm's kernel, beside fa3's.

    python benchmark/bench_latent.py --out FILE      on a Hopper GPU

Heads as DeepSeek-V2-Lite has them (16 on a latent of 512, and 64 for positions), or as a rank of
two has of 64 (32), bf16. Both are captured in a CUDA graph, each layer with a cache of its own, and
both are compared with the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from attention_contenders import Attention, attention_of, make_list
from attention_shapes import BYTES_PER_MS, Groups, Inputs, make_inputs, uniform
from bench_attention import check, step_ms
from results_file import ResultFile
from sglang_batchllm.attention.fused import FusedDecode, choose_configs

LATENT, ROPE = 512, 64
CACHE_BYTES = 1 << 30
"""Of all layers' together, so that none finds its KV in the L2."""

SHAPES: dict[str, Groups] = {
    "50x16, 2000, 250": uniform(50, 16, 2000, 250),
    "8x64, 2000, 250": uniform(8, 64, 2000, 250),
    "30x4, 2000, 250": uniform(30, 4, 2000, 250),
    "16x32, 8000, 300": uniform(16, 32, 8000, 300),
    "256 singletons of 2250": uniform(256, 1, 0, 2250),
}


def make_latent_inputs(groups: Groups, heads: int) -> Inputs:
    inputs = make_inputs(groups)
    slots = inputs.caches[0][0].shape[0]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    copies = min(max(2, CACHE_BYTES // (slots * (LATENT + ROPE) * 2)), 8)
    caches = [random(slots, 1, LATENT + ROPE) for _ in range(copies)]
    return replace(
        inputs,
        q=random(inputs.q.shape[0], heads, LATENT + ROPE),
        caches=[(cache, cache[..., :LATENT]) for cache in caches],
    )


def make_ours(inputs: Inputs) -> tuple[Callable[[], None], Attention]:
    heads = inputs.q.shape[1]
    configs = choose_configs(torch.bfloat16, LATENT, heads, rope_dim=ROPE)
    work, build = make_list(inputs, configs, 1)
    fused = FusedDecode(configs, work, heads, 1, LATENT, torch.bfloat16, "cuda", ROPE)
    return build, attention_of(fused, inputs)


def make_fa3(inputs: Inputs) -> Attention:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    batch = inputs.q.shape[0]
    page_table = inputs.req_to_token[inputs.rows].contiguous()
    lengths = inputs.seq_lens.int()
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    cu_seqlens_k = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_with_kvcache(
            q=inputs.q[..., LATENT:],
            k_cache=k[:, None, :, LATENT:],
            v_cache=v[:, None],
            qv=inputs.q[..., :LATENT],
            page_table=page_table,
            cache_seqlens=lengths,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k_new=cu_seqlens_k,
            max_seqlen_q=1,
            softmax_scale=inputs.scale,
            causal=True,
        )

    return attention


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("--heads", nargs="+", type=int, default=[16, 32])
    args = parser.parse_args()
    file = ResultFile(args.out, ("case", "heads"))
    for heads in args.heads:
        for name, groups in SHAPES.items():
            inputs = make_latent_inputs(groups, heads)
            once, ours = make_ours(inputs)
            once()
            error = check(ours, inputs)
            milliseconds = step_ms(once, ours, inputs)
            fa3 = make_fa3(inputs)
            row = file.add(
                {
                    "case": name,
                    "heads": heads,
                    "unit": "ms per layer",
                    "floor": inputs.unique_tokens * (LATENT + ROPE) * 2 / BYTES_PER_MS,
                    "ours": milliseconds,
                    "error": error,
                    "fa3 error": check(fa3, inputs),
                    "fa3": step_ms(None, fa3, inputs),
                }
            )
            print(
                f"{heads} heads, {name:24} ours {row['ours']:7.3f}  fa3 {row['fa3']:7.3f}  "
                f"ratio {row['fa3'] / row['ours']:5.2f}  floor {row['floor']:6.3f}  "
                f"errors {row['error']:.1e} {row['fa3 error']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
