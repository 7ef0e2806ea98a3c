"""Merging the parts of each request, the second launch of decode attention (``kernels.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_batchllm.attention.items import LOG2_E


@triton.jit
def merge_kernel(
    out_ptr,
    part_ptr,
    lse_ptr,
    sink_ptr,
    part_base_ptr,
    part_count_ptr,
    stride_out,
    v_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge a request's parts by log-sum-exp, BLOCK_M query heads a program."""
    request = tl.program_id(0)
    count = tl.load(part_count_ptr + request)
    base = tl.load(part_base_ptr + request)
    if count > 1:
        offs_d = tl.arange(0, BLOCK_D)
        head = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = head < NUM_HEADS
        mask = valid[:, None] & (offs_d[None, :] < HEAD_DIM)
        total_max = tl.full([BLOCK_M], -1e30, tl.float32)
        total_sum = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Two parts a round, the usual number, so that their loads overlap.
        for p in range(0, count, 2):
            more = p + 1 < count
            at_0 = (base + p) * NUM_HEADS + head
            at_1 = at_0 + NUM_HEADS
            lse_0 = tl.load(lse_ptr + at_0, mask=valid, other=-float("inf"))
            lse_1 = tl.load(lse_ptr + at_1, mask=valid & more, other=-float("inf"))
            value_0 = tl.load(
                part_ptr + (at_0[:, None] * HEAD_DIM + offs_d[None, :]), mask=mask, other=0.0
            )
            value_1 = tl.load(
                part_ptr + (at_1[:, None] * HEAD_DIM + offs_d[None, :]), mask=mask & more, other=0.0
            )
            new_max = tl.maximum(total_max, tl.maximum(lse_0, lse_1))
            rescale = tl.exp2(total_max - new_max)
            weight_0 = tl.exp2(lse_0 - new_max)
            weight_1 = tl.exp2(lse_1 - new_max)
            total_sum = total_sum * rescale + weight_0 + weight_1
            total = total * rescale[:, None] + value_0.to(tl.float32) * weight_0[:, None]
            total += value_1.to(tl.float32) * weight_1[:, None]
            total_max = new_max
        if SINKS:
            sink = tl.load(sink_ptr + head, mask=valid, other=0.0).to(tl.float32)
            total_sum += tl.exp2(sink * LOG2_E - total_max)
        scale = v_scale / tl.where(total_sum > 0.0, total_sum, 1.0)
        tl.store(
            out_ptr + (request * stride_out + head[:, None] * HEAD_DIM + offs_d[None, :]),
            (total * scale[:, None]).to(out_ptr.dtype.element_ty),
            mask=mask,
        )
