"""Queries of a prefill, copied out of the QKV projection's output in wide elements.

SGLang's FlashAttention and FlashInfer backends first make a prefill's queries contiguous. PyTorch
copies a strided tensor element by element: two bytes at a time that moves 1.7 TB/s on an H200,
sixteen at a time 3.7 of the 4.3 that the memory has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

COPYING_BACKENDS = ("FlashAttentionBackend", "FlashInferAttnBackend")
"""Backends that call ``q.contiguous()``; others read queries where they are."""

WIDE = torch.complex128
"""The widest element that PyTorch copies as a whole, 16 bytes."""


def forward_with_packed_queries(
    stock_forward: Any,
    hybrid: HybridAttnBackend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: RadixAttention,
    forward_batch: ForwardBatch,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Wraps HybridAttnBackend.forward: queries go on packed where they would be copied anyway."""
    copied = type(hybrid.prefill_backend).__name__ in COPYING_BACKENDS
    if copied and q.is_cuda and forward_batch.forward_mode.is_extend():
        q = packed(q)
    return stock_forward(hybrid, q, k, v, layer, forward_batch, *args, **kwargs)


def packed(q: torch.Tensor) -> torch.Tensor:
    """``q.contiguous()``. q: [tokens, query heads * head_dim] of any strides."""
    width = WIDE.itemsize // q.itemsize
    rows_are_whole = q.dim() == 2 and q.stride(1) == 1 and q.shape[1] % width == 0
    starts_are_whole = q.stride(0) % width == 0 and q.storage_offset() % width == 0
    if q.is_contiguous() or not (rows_are_whole and starts_are_whole):
        return q.contiguous()
    return q.view(WIDE).contiguous().view(q.dtype)
