"""Mixed batches, of requests that prefill and requests that decode, as two passes side by side.

SGLang runs such a batch (`--enable-mixed-chunk`) as one prefill in which a decoding request is a
prompt of one new token: without CUDA graphs, and each request reads its whole context for itself.
Here the decoding part is a decode step like any other, shared prefixes and CUDA graph included, on
a stream of its own beside the prefill: the one is bound by memory and the other by arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner import EagerRunner

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput


def forward_in_parts(
    stock_forward: Callable[..., ModelRunnerOutput],
    runner: ModelRunner,
    batch: ForwardBatch,
    *args: Any,
    **kwargs: Any,
) -> ModelRunnerOutput:
    """Wraps ModelRunner._forward_raw."""
    if not batch.forward_mode.is_mixed() or not _can_split(batch):
        return stock_forward(runner, batch, *args, **kwargs)
    prefill, decode = split_mixed(batch)
    if prefill is None or decode is None:
        return stock_forward(runner, prefill or decode, *args, **kwargs)
    beside = _stream_beside(runner)
    if beside is None:
        decoded = stock_forward(runner, decode, *args, **kwargs)
        output = stock_forward(runner, prefill, *args, **kwargs)
    else:
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            decoded = stock_forward(runner, decode, *args, **kwargs)
        output = stock_forward(runner, prefill, *args, **kwargs)
        here.wait_stream(beside)
    # The decode graph's word that it has read req_to_token does not hold for the prefill.
    runner.war_fastpath_read_done_event = None
    logits: Any = output.logits_output
    others: Any = decoded.logits_output
    logits.next_token_logits = torch.cat([logits.next_token_logits, others.next_token_logits])
    output.can_run_graph = False
    return output


def split_mixed(batch: ForwardBatch) -> tuple[ForwardBatch | None, ForwardBatch | None]:
    """The part of a mixed batch that prefills and the part that decodes, None for an empty one.

    The latter are its last requests, of one token each. A prefill of a single token that stands
    right before them counts as one of them: it is the same work.
    """
    lengths = batch.extend_seq_lens_cpu
    assert lengths is not None
    requests = len(lengths)
    while requests and lengths[requests - 1] == 1:
        requests -= 1
    tokens = sum(lengths[:requests])
    prefill = decode = None
    if requests:
        prefill = _part(batch, slice(requests), slice(tokens))
        prefill.forward_mode = ForwardMode.EXTEND
        prefill.extend_num_tokens = tokens
    if requests < len(lengths):
        decode = _part(batch, slice(requests, None), slice(tokens, None))
        decode.forward_mode = ForwardMode.DECODE
        for name in _OF_PREFILLS:
            setattr(decode, name, None)
    return prefill, decode


def _part(batch: ForwardBatch, requests: slice, tokens: slice) -> ForwardBatch:
    part = copy.copy(batch)
    for names, chosen in ((_PER_REQUEST + _OF_PREFILLS, requests), (_PER_TOKEN, tokens)):
        for name in names:
            values = getattr(batch, name, None)
            if values is not None:
                setattr(part, name, values[chosen])
    part.batch_size = len(part.req_pool_indices)
    part.num_token_non_padded_cpu = len(part.input_ids)
    if part.seq_lens_cpu is not None:
        part.seq_lens_sum = int(part.seq_lens_cpu.sum())
    return part


def _can_split(batch: ForwardBatch) -> bool:
    """Whether a batch is made of nothing but what `_part` knows how to divide."""
    capture = batch.capture_hidden_mode
    return (
        not batch.return_logprob
        and (capture is None or not capture.need_capture())
        and not any(batch.lora_ids or ())
        and not any(inputs is not None for inputs in batch.mm_inputs or ())
        and all(getattr(batch, name, None) is None for name in _UNDIVIDED)
    )


def _stream_beside(runner: ModelRunner) -> torch.cuda.Stream | None:
    """A stream for the decoding part, or None where it must take its turn: on a CPU, where ranks
    talk to each other within a pass, and where CUDA graphs of both parts share memory."""
    graphs = runner.prefill_cuda_graph_runner
    prefills_eagerly = graphs is None or isinstance(graphs, EagerRunner)
    if runner.device != "cuda" or runner.ps.tp_size > 1 or not prefills_eagerly:
        return None
    return _high_priority_stream(runner.gpu_id)


@cache
def _high_priority_stream(device: int) -> torch.cuda.Stream:
    """Decode kernels are small and many, and would wait for whole prefill kernels otherwise."""
    return torch.cuda.Stream(device, priority=-1)


_PER_TOKEN = ("input_ids", "positions", "out_cache_loc")
_PER_REQUEST = (
    *("req_pool_indices", "seq_lens", "seq_lens_cpu", "orig_seq_lens"),
    *("lora_ids", "rids", "mm_inputs", "top_logprobs_nums", "token_ids_logprobs"),
)
_OF_PREFILLS = (
    *("extend_seq_lens", "extend_seq_lens_cpu", "extend_prefix_lens", "extend_prefix_lens_cpu"),
    *("extend_start_loc", "extend_logprob_start_lens_cpu"),
)
_UNDIVIDED = (
    *("input_embeds", "replace_embeds", "encoder_lens", "mrope_positions", "spec_info"),
    *("token_type_ids", "mamba_track_indices", "global_num_tokens_cpu", "num_token_non_padded"),
)
