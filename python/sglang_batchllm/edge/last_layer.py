"""Prefill computes the end of the last layer only where a token is sampled.

Every prompt token has to leave its K and V in every layer. What the last layer computes after its
attention (output projection, norm, MLP) is read by the logits alone, at the last token of each
request and where logprobs of the prompt are asked for. So a prefill step of T tokens and R requests
that sample puts R rows through that part, not T: of a model with 32 layers of Llama-8B's shape,
2.8% of the matrix work. llama.cpp does the same in its own graphs; here it takes forward hooks,
since the model's code is SGLang's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.server_args import ServerArgs

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.args import resolved
from sglang_batchllm.edge.model_kind import prefill_is_compiled
from sglang_batchllm.edge.transfers import to_device

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import last_layer as seam
else:
    seam = seams.load("last_layer")

logger = logging.getLogger(__name__)

KNOWN_LAYERS = frozenset(
    {
        "sglang.srt.models.llama.LlamaDecoderLayer",
        "sglang.srt.models.qwen2.Qwen2DecoderLayer",
        "sglang.srt.models.qwen3.Qwen3DecoderLayer",
    }
)
"""Layers that end in `o_proj`, a norm that adds the residual, and an MLP row by row."""


def sample_rows_in_last_layer(model: torch.nn.Module, server_args: ServerArgs) -> None:
    """Install the hooks on a model that they are known to be right for; leave others alone."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    layer = layers[-1] if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
    reason = _refusal(layer, server_args)
    if layer is None or reason is not None:
        logger.info("batchllm: the last layer is computed for every prompt token (%s)", reason)
        return
    seam.SampledRows(layer, sampled_rows)


def _refusal(layer: torch.nn.Module | None, server_args: ServerArgs) -> str | None:
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if name not in KNOWN_LAYERS:
        return f"its layers are {name}"
    args = resolved(server_args)
    if args.enable_lora:
        return "LoRA adapters are applied by token position"
    if args.enable_torch_compile or prefill_is_compiled(args.cuda_graph_config):
        return "the model is compiled"
    if args.tp_size > 1 and seam.norm_may_reduce(layer):
        return "its norm may be fused with the all-reduce of tensor parallelism"
    return None


def sampled_rows(batch: ForwardBatch) -> torch.Tensor | None:
    """The rows (int64, rising) of a prefill or mixed batch whose logits are read; None where
    that is all rows, or where more than the logits is asked for."""
    if not batch.forward_mode.is_extend() or batch.extend_seq_lens is None:
        return None
    if batch.capture_hidden_mode != CaptureHiddenMode.NULL:
        return None
    if batch.multi_item_delimiter_indices is not None or seam.is_scored_anywhere(batch):
        return None
    if batch.input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a graph is replayed with other batches
    tokens, requests = batch.input_ids.shape[0], batch.extend_seq_lens.shape[0]
    if not batch.return_logprob:
        return None if tokens == requests else torch.cumsum(batch.extend_seq_lens, dim=0) - 1
    if batch.extend_seq_lens_cpu is None or batch.extend_logprob_start_lens_cpu is None:
        return None
    rows = _scored_rows(batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu)
    return None if len(rows) == tokens else to_device(rows, batch.input_ids.device)


def _scored_rows(extend_lens: Sequence[int], logprob_starts: Sequence[int]) -> np.ndarray:
    """Of each request those from where it asks for logprobs on, at least the last; int64[rows]."""
    lengths = np.array(extend_lens)
    starts = np.minimum(np.array(logprob_starts), lengths - 1)
    counts = lengths - starts
    first = np.cumsum(lengths) - lengths + starts
    return np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
