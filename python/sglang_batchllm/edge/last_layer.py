"""Prefill computes the end of the last layer only where a token is sampled.

Every prompt token has to leave its K and V in every layer. What the last layer computes after its
attention (output projection, norm, MLP) is read by the logits alone, at the last token of each
request. So a prefill step of T tokens and R requests puts R rows through that part, not T: of a
model with 32 layers of Llama-8B's shape, 2.8% of the matrix work. llama.cpp does the same in its
own graphs; here it takes forward hooks, since the model's code is SGLang's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.server_args import ServerArgs

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.args import resolved
from sglang_batchllm.edge.model_kind import prefill_is_compiled

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
    """The rows (int64 [requests]) of a prefill or mixed batch whose logits are read; None where
    that is all rows, or where more than the logits is asked for."""
    if not batch.forward_mode.is_extend() or batch.extend_seq_lens is None:
        return None
    if batch.input_ids.shape[0] == batch.extend_seq_lens.shape[0]:
        return None
    if batch.capture_hidden_mode != CaptureHiddenMode.NULL or _wants_prompt_logprobs(batch):
        return None
    if batch.multi_item_delimiter_indices is not None:
        return None  # several texts of one prompt are scored
    if batch.input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a graph is replayed with other batches
    return torch.cumsum(batch.extend_seq_lens, dim=0) - 1


def _wants_prompt_logprobs(batch: ForwardBatch) -> bool:
    lengths, starts = batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu
    if not batch.return_logprob or lengths is None or starts is None:
        return batch.return_logprob
    return any(start < length for length, start in zip(lengths, starts, strict=True))
