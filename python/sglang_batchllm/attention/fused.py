"""The fused kernel as one callable: its tile sizes, its workspace, its two launches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton

from sglang_batchllm.attention import items, kernels
from sglang_batchllm.attention.merge import merge_kernel
from sglang_batchllm.attention.worklist import MANY_REQUESTS, WorkList, next_power_of_2

LOG2_E: float = items.LOG2_E.value

STAGES = 5 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 3
"""With two tiles of keys and values in flight. A tile's slots are loaded first, and up to Triton
3.6 (SGLang 0.5.17) that takes stages of its own; in 3.8 (0.5.23) five are four tiles."""
SHARED_MEMORY = 228 * 1024
"""Bytes of a multiprocessor of an H100, H200 or B200; where there is no GPU, too."""
OTHER_MEMORY = 8 * 1024
"""Bytes of a program beside tiles of keys and values: queries, slots, what the driver keeps."""


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes and launch shape; rows of a query tile are (member, query head of one KV head).

    block_m_small serves suffix items and groups of few members, block_m_large larger groups;
    block_n is KV tokens a step and stages the depth of the load pipeline, see STAGES.
    """

    block_m_small: int
    block_n_small: int
    stages_small: int
    block_m_large: int
    block_n_large: int
    stages_large: int
    num_warps: int
    programs_per_sm: int
    max_registers: int | None = None


class KernelConfigs(NamedTuple):
    """few, many: for batches below `MANY_REQUESTS`, and from there on. Query tiles are the same."""

    few: KernelConfig
    many: KernelConfig

    def of(self, batch_size: int) -> KernelConfig:
        return self.many if batch_size >= MANY_REQUESTS else self.few


def choose_configs(
    dtype: torch.dtype,
    head_dim: int,
    ratio: int,
    shared_memory: int = SHARED_MEMORY,
    rope_dim: int = 0,
) -> KernelConfigs:
    """For a model dtype, head dimension, query heads per KV head, bytes of shared memory, and what
    a key has more elements than its value (`FusedDecode`).

    Large batches spend their time in the products of large groups, for which two programs of a
    multiprocessor with tiles twice as long are faster than three; small ones wait for memory.
    """
    if rope_dim:
        config = choose_latent_config(dtype, ratio, shared_memory)
        return KernelConfigs(config, config)
    few = choose_config(dtype, head_dim, ratio, shared_memory)
    if few.programs_per_sm < 3:
        return KernelConfigs(few, few)
    many = replace(few, block_n_large=2 * few.block_n_large, programs_per_sm=2, max_registers=None)
    return KernelConfigs(few, many)


def choose_config(
    dtype: torch.dtype, head_dim: int, ratio: int, shared_memory: int = SHARED_MEMORY
) -> KernelConfig:
    """Tile sizes for a model dtype, head dimension and query heads per KV head.

    shared_memory: bytes of a multiprocessor. Tuned on an H200 for 16-bit heads of 128
    (benchmark/bench_attention.py): three programs of 168 registers per multiprocessor hide the
    latency of short suffixes better than two with larger tiles. Where memory is too little for
    three, tiles are half as long, and as many programs run as it is enough for.
    """
    lanes = next_power_of_2(ratio)
    small, large = max(16, lanes), max(64, lanes)
    if dtype == torch.float32:
        # No tensor cores at full precision: small tiles keep the operands in registers.
        return KernelConfig(small, 16, 2, max(32, lanes), 16, 2, 4, 1)
    if lanes > 16:
        return KernelConfig(small, 32, 3, large, 32, 3, 4, 1)
    if head_dim > 128:
        # Two programs of a multiprocessor, with tiles of 16 members where 64 rows hold them: on an
        # H200 58% to 64% of the time of one with tiles of 64 rows, with 16 heads on 8 of 256, in
        # the cases of benchmark/results/windows.json. Other ratios were not timed.
        programs = 2 if shared_memory >= SHARED_MEMORY else 1
        return KernelConfig(small, 32, 3, min(max(32, 16 * lanes), 64), 32, 3, 4, programs)
    token = 2 * next_power_of_2(head_dim) * dtype.itemsize  # its key and value
    block_n = 64 if shared_memory >= 3 * (2 * 64 * token + OTHER_MEMORY) else 32
    programs = min(max(shared_memory // (2 * block_n * token + OTHER_MEMORY), 1), 3)
    registers = 168 if programs == 3 else None
    return KernelConfig(small, block_n, STAGES, large, block_n // 2, STAGES, 4, programs, registers)


def choose_latent_config(dtype: torch.dtype, ratio: int, shared_memory: int) -> KernelConfig:
    """Tile sizes for multi-head latent attention with 512 elements of value. Of 16, 32 and 64
    tokens, the longest were fastest on an H200 for 16 heads (benchmark/bench_latent.py)."""
    lanes = next_power_of_2(ratio)
    if dtype == torch.float32:
        return KernelConfig(max(16, lanes), 16, 1, max(16, lanes), 16, 1, 4, 1)
    block_n = 64 if shared_memory >= SHARED_MEMORY else 32
    return KernelConfig(max(16, lanes), block_n, 3, max(64, lanes), block_n, 3, 8, 1)


class FusedDecode:
    """The kernel with its workspace, for one attention shape.

    rope_dim: with multi-head latent attention, in its absorbed form, one KV head's value is the
    latent, of `head_dim` elements, and its key is that and so many elements more; else 0.

    The workspace is parts [part capacity, query heads, head_dim] in the model's dtype, part_lse
    [part capacity, query heads] fp32 (base 2) and the queue's counter, which is 0 between
    launches.
    """

    def __init__(
        self,
        configs: KernelConfigs,
        work: WorkList,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        rope_dim: int = 0,
    ) -> None:
        self.configs = configs
        self.work = work
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_dim = rope_dim
        # KV heads that fill a small query tile, and among whose keys a step of it divides evenly.
        few = configs.few
        room = few.block_m_small // next_power_of_2(num_heads // num_kv_heads)
        self.wide_heads = math.gcd(num_kv_heads, next_power_of_2(room), few.block_n_small)
        self.parts = torch.empty(
            (work.part_capacity, num_heads, head_dim), dtype=dtype, device=device
        )
        self.part_lse = torch.empty(
            (work.part_capacity, num_heads), dtype=torch.float32, device=device
        )
        self.queue = torch.zeros(1, dtype=torch.int32, device=device)

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        req_to_token: torch.Tensor,
        scale: float,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> torch.Tensor:
        """Attention of the batch in the work list, into ``out``.

        q: [batch, query heads, head_dim + rope_dim], out: [batch, query heads, head_dim], rows may
        be strided; k_cache: [slots, KV heads, head_dim + rope_dim], v_cache: [slots, KV heads,
        head_dim] (with a rope_dim not read), of any dtype that converts to q's; k_scale, v_scale:
        what a cached value is to be multiplied by; req_to_token: int32 [rows, context]; softcap: 0
        for none; sinks: [query heads], a logit that takes part in the softmax's denominator only.
        """
        config = self.configs.of(q.shape[0])
        work = self.work
        ratio = self.num_heads // self.num_kv_heads
        block_d = max(next_power_of_2(self.head_dim), 16)
        sink_tensor = sinks if sinks is not None else q
        kernels.fused_decode_kernel[(work.config.programs_for(q.shape[0]),)](
            q,
            k_cache,
            v_cache,
            out,
            self.parts,
            self.part_lse,
            self.queue,
            sink_tensor,
            req_to_token,
            work.slots,
            work.header,
            work.items,
            work.members,
            work.part_base,
            work.window_start,
            q.stride(0),
            k_cache.stride(0),
            v_cache.stride(0),
            out.stride(0),
            req_to_token.stride(0),
            scale * k_scale * LOG2_E,
            softcap * LOG2_E,
            v_scale,
            NUM_KV_HEADS=self.num_kv_heads,
            RATIO=ratio,
            RATIO_P2=next_power_of_2(ratio),
            HEAD_DIM=self.head_dim,
            ROPE_DIM=self.rope_dim,
            BLOCK_D=block_d,
            BLOCK_M_SMALL=config.block_m_small,
            BLOCK_N_SMALL=config.block_n_small,
            STAGES_SMALL=config.stages_small,
            BLOCK_M_LARGE=config.block_m_large,
            BLOCK_N_LARGE=config.block_n_large,
            STAGES_LARGE=config.stages_large,
            SOFTCAP=softcap > 0.0,
            SINKS=sinks is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            THREADS=32 * config.num_warps,
            WIDE_HEADS=self.wide_heads,
            WINDOWED=work.config.window is not None,
            num_warps=config.num_warps,  # pyright: ignore[reportCallIssue]
            maxnreg=config.max_registers,  # pyright: ignore[reportCallIssue]
        )
        block_m = min(next_power_of_2(self.num_heads), 8)
        merge_kernel[(q.shape[0], triton.cdiv(self.num_heads, block_m))](
            out,
            self.parts,
            self.part_lse,
            sink_tensor,
            work.part_base,
            work.part_count,
            out.stride(0),
            v_scale,
            NUM_HEADS=self.num_heads,
            HEAD_DIM=self.head_dim,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            SINKS=sinks is not None,
            num_warps=4,  # pyright: ignore[reportCallIssue]
        )
        return out
