"""Prefill computes the end of the last layer only where a token is sampled.

Every prompt token has to leave its K and V in every layer. What the last layer computes after its
attention (output projection, norm, MLP) is read by the logits alone, at the last token of each
request. So a prefill step of T tokens and R requests puts R rows through that part, not T: of a
model with 32 layers of Llama-8B's shape, 2.8% of the matrix work. llama.cpp does the same in its
own graphs; here it takes forward hooks, since the model's code is SGLang's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.server_args import ServerArgs

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
    SampledRows(layer)


def _refusal(layer: torch.nn.Module | None, server_args: ServerArgs) -> str | None:
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if name not in KNOWN_LAYERS:
        return f"its layers are {name}"
    if server_args.enable_lora:
        return "LoRA adapters are applied by token position"
    if server_args.enable_torch_compile:
        return "the model is compiled"
    if hasattr(layer, "layer_communicator") and server_args.tp_size > 1:
        return "its norm may be fused with the all-reduce of tensor parallelism"
    return None


class SampledRows:
    """The hooks of one decoder layer, a model's last.

    The layer returns hidden states and residual of the usual shape [tokens, hidden size], whose
    rows are zero where nothing is sampled.
    """

    def __init__(self, layer: Any) -> None:
        self._rows: torch.Tensor | None = None
        self._tokens = 0
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.self_attn.o_proj.register_forward_pre_hook(self._take_attention)
        layer.post_attention_layernorm.register_forward_pre_hook(self._take_residual)
        layer.register_forward_hook(self._end)

    def _begin(self, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        arguments = (*args, *kwargs.values())
        batch = next(value for value in arguments if isinstance(value, ForwardBatch))
        self._rows = sampled_rows(batch)
        self._tokens = batch.input_ids.shape[0]

    def _take_attention(self, o_proj: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        return None if self._rows is None else (args[0][self._rows], *args[1:])

    def _take_residual(self, norm: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        if self._rows is None:
            return None
        hidden, residual, *others = args
        return (hidden, residual[self._rows], *others)

    def _end(self, layer: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        if self._rows is None:
            return None
        rows, self._rows = self._rows, None
        return tuple(
            part.new_zeros((self._tokens, part.shape[-1])).index_copy_(0, rows, part)
            for part in output
        )


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
