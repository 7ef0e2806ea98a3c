"""Mixed batches: requests that prefill, and after them requests that decode one token each.

SGLang runs such a batch as one prefill in which a decoding request is a prompt of one new token,
and so reads its whole context for itself. Here the two parts go their own ways: prefill through
the native backend, decode through the shared-prefix kernel. Only where the step is launched kernel
by kernel: a captured prefill is replayed as it was captured.

With ``--enable-mixed-chunk`` whatever decodes may ride in steps that prefill. Without it short
answers do: see `policy.admission.short`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_batchllm.edge.args import resolved
from sglang_batchllm.policy.step import Mixes

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.server_args import ServerArgs


def what_mixes(server_args: ServerArgs, attention: AttentionBackend) -> Mixes:
    """Which requests may decode in a step that prefills. attention: of the model.

    Nobody is made to where that would read more than a decode step of their own, where tests have
    not shown it to be exact, or where outputs are not to depend on what else runs.
    """
    args = resolved(server_args)
    if args.enable_mixed_chunk:
        return "all"
    if args.enable_lora or args.enable_two_batch_overlap or args.enable_deterministic_inference:
        return "none"
    shares = getattr(getattr(attention, "decode_backend", None), "takes_mixed", False)
    return "short" if shares else "none"


def rides_in(batch: ScheduleBatch) -> bool:
    """Whether the requests of a batch, which decode, may do so in a step that prefills."""
    asks_more = batch.return_logprob or batch.return_hidden_states
    return not (asks_more or any(batch.multimodal_inputs or ()))


def keeps_to_itself(req: Req) -> bool:
    """Whether nobody may decode in a step that prefills this request."""
    return bool(req.return_logprob or req.return_hidden_states or req.multimodal_inputs)


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
    # Cloned to where memory is aligned: Triton compiles another kernel for what is not.
    rows, seq_lens = batch.req_pool_indices[requests:], batch.seq_lens[requests:]
    return MixedBatch(prefill, tokens, rows.clone(), seq_lens.clone())


def run_eagerly(stock: Any, runner: Any, batch: ForwardBatch, *args: Any, **kwargs: Any) -> Any:
    """Wraps EagerRunner.execute: within a step with a mixed batch, `select_backend` sends it where
    its decode part can share prefixes. (SGLang 0.5.23 calls it a prefill from there on.)"""
    hybrid: Any = runner.model_runner.attn_backend
    decode: Any = getattr(hybrid, "decode_backend", None)
    if not batch.forward_mode.is_mixed() or not getattr(decode, "takes_mixed", False):
        return stock(runner, batch, *args, **kwargs)
    decode.share_prefill_backend(hybrid.prefill_backend)
    decode.in_mixed_step = True
    try:
        return stock(runner, batch, *args, **kwargs)
    finally:
        decode.in_mixed_step = False


def select_backend(
    stock_rule: Any, hybrid: HybridAttnBackend, forward_mode: ForwardMode
) -> AttentionBackend:
    """Wraps HybridAttnBackend._select_backend."""
    if getattr(hybrid.decode_backend, "in_mixed_step", False):
        return hybrid.decode_backend
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
