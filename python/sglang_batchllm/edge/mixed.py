"""Mixed batches: requests that prefill, and after them requests that decode one token each.

SGLang runs such a batch as one prefill in which a decoding request is a prompt of one new token,
and so reads its whole context for itself. Here the two parts go their own ways: prefill through
the native backend, decode through the shared-prefix kernel.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class MixedBatch:
    """A mixed batch in two parts.

    prefill: the batch of the requests that prefill, None if there are none. tokens: theirs, the
    first ones of the batch. rows, seq_lens: request pool rows and tokens of those that decode.
    """

    prefill: ForwardBatch | None
    tokens: int
    rows: torch.Tensor
    seq_lens: torch.Tensor


def split_mixed(batch: ForwardBatch) -> MixedBatch:
    """The parts of a batch whose forward mode is mixed.

    A prefill of a single token that stands right before the decoding ones counts as one of them:
    to attention they are the same.
    """
    lengths = batch.extend_seq_lens_cpu
    assert lengths is not None
    requests = len(lengths)
    while requests and lengths[requests - 1] == 1:
        requests -= 1
    tokens = sum(lengths[:requests])
    prefill = _first_requests(batch, requests, tokens) if requests else None
    return MixedBatch(prefill, tokens, batch.req_pool_indices[requests:], batch.seq_lens[requests:])


def select_backend(
    stock_rule: Any, hybrid: HybridAttnBackend, forward_mode: ForwardMode
) -> AttentionBackend:
    """Wraps HybridAttnBackend._select_backend: mixed batches go where their decode part can
    share prefixes."""
    decode: Any = hybrid.decode_backend
    if forward_mode.is_mixed() and getattr(decode, "takes_mixed", False):
        decode.share_prefill_backend(hybrid.prefill_backend)
        return decode
    return stock_rule(hybrid, forward_mode)


def _first_requests(batch: ForwardBatch, requests: int, tokens: int) -> ForwardBatch:
    part = copy.copy(batch)
    part.forward_mode = ForwardMode.EXTEND
    part.batch_size = requests
    part.extend_num_tokens = tokens
    for name in _PER_TOKEN:
        setattr(part, name, _head(getattr(batch, name, None), tokens))
    for name in _PER_REQUEST:
        setattr(part, name, _head(getattr(batch, name, None), requests))
    if part.seq_lens_cpu is not None:
        part.seq_lens_sum = int(part.seq_lens_cpu.sum())
    return part


def _head(values: Any, count: int) -> Any:
    return None if values is None else values[:count]


_PER_TOKEN = ("input_ids", "positions", "out_cache_loc")
_PER_REQUEST = (
    *("req_pool_indices", "seq_lens", "seq_lens_cpu", "orig_seq_lens"),
    *("extend_seq_lens", "extend_seq_lens_cpu", "extend_prefix_lens", "extend_prefix_lens_cpu"),
    *("extend_start_loc", "extend_logprob_start_lens_cpu"),
)
