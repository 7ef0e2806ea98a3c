"""Where a decoder layer keeps its residual: in a stream beside the batch.

The stream holds the residual, and what is still to be added to it (``pending``) once a layer ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.layer_boundary.residual.batch import stream_of
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class SampledRows:
    """The hooks of one decoder layer, a model's last.

    The layer leaves hidden states and residual of the usual shape [tokens, hidden size], whose
    rows are zero where nothing is sampled. choose: see `edge.last_layer.sampled_rows`.
    """

    def __init__(self, layer: Any, choose: Callable[[ForwardBatch], torch.Tensor | None]) -> None:
        self._choose = choose
        self._rows: torch.Tensor | None = None
        self._batch: ForwardBatch | None = None
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.self_attn.o_proj.register_forward_pre_hook(self._take_rows)
        layer.register_forward_hook(self._end)

    def _begin(self, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        arguments = (*args, *kwargs.values())
        self._batch = next(value for value in arguments if isinstance(value, ForwardBatch))
        self._rows = self._choose(self._batch)

    def _take_rows(self, o_proj: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        """The residual was written before attention, and is read next after its projection."""
        if self._rows is None:
            return None
        stream: Any = stream_of(self._batch)
        stream.residual = stream.residual[self._rows]
        return (args[0][self._rows], *args[1:])

    def _end(self, layer: torch.nn.Module, args: Any, output: torch.Tensor) -> Any:
        if self._rows is None:
            return None
        stream: Any = stream_of(self._batch)
        stream.residual = self._spread(stream.residual)
        stream.pending.value = self._spread(stream.pending.value)
        self._rows = self._batch = None
        return stream.pending.value

    def _spread(self, part: torch.Tensor) -> torch.Tensor:
        assert self._rows is not None and self._batch is not None
        tokens = self._batch.input_ids.shape[0]
        return part.new_zeros((tokens, part.shape[-1])).index_copy_(0, self._rows, part)


def norm_may_reduce(layer: Any) -> bool:
    """Whether the layer's norm may be fused with the all-reduce of tensor parallelism."""
    return True


def is_scored_anywhere(batch: ForwardBatch) -> bool:
    """Whether logits are read at positions that requests name."""
    return batch.token_indices_to_pool is not None
