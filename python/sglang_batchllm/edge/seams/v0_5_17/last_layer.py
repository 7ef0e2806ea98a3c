"""Where a decoder layer keeps its residual: among its arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class SampledRows:
    """The hooks of one decoder layer, a model's last.

    The layer returns hidden states and residual of the usual shape [tokens, hidden size], whose
    rows are zero where nothing is sampled. choose: see `edge.last_layer.sampled_rows`.
    """

    def __init__(self, layer: Any, choose: Callable[[ForwardBatch], torch.Tensor | None]) -> None:
        self._choose = choose
        self._rows: torch.Tensor | None = None
        self._tokens = 0
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.self_attn.o_proj.register_forward_pre_hook(self._take_attention)
        layer.post_attention_layernorm.register_forward_pre_hook(self._take_residual)
        layer.register_forward_hook(self._end)

    def _begin(self, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        arguments = (*args, *kwargs.values())
        batch = next(value for value in arguments if isinstance(value, ForwardBatch))
        self._rows = self._choose(batch)
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


def norm_may_reduce(layer: Any) -> bool:
    """Whether the layer's norm may be fused with the all-reduce of tensor parallelism."""
    return hasattr(layer, "layer_communicator")


def is_scored_anywhere(batch: ForwardBatch) -> bool:
    """Whether logits are read at positions that requests name; they can not."""
    return False
