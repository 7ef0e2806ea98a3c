"""What recurrent layers of the CPU reference platform have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def passes(forward_batch: ForwardBatch) -> tuple[list[int], list[bool]]:
    """Tokens that each request computes, and whether it has a state already."""
    if forward_batch.forward_mode.is_decode():
        return [1] * forward_batch.batch_size, [True] * forward_batch.batch_size
    assert forward_batch.extend_seq_lens is not None
    assert forward_batch.extend_prefix_lens is not None
    prefixes = forward_batch.extend_prefix_lens.tolist()
    return forward_batch.extend_seq_lens.tolist(), [prefix > 0 for prefix in prefixes]


def convolve(
    x: torch.Tensor, before: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Causal convolution of each channel, and SiLU. x: [tokens, channels]; before: [channels,
    width - 1], the last inputs, which become those of x; weights: [channels, width]."""
    inputs = torch.cat([before.float(), x.T], dim=1)
    bias = None if bias is None else bias.float()
    y = F.conv1d(inputs[None], weights.float()[:, None], bias, groups=len(weights))[0]
    before.copy_(inputs[:, inputs.shape[1] - before.shape[1] :])
    return F.silu(y).T
