"""Linear attention of the CPU reference platform: what SGLang has as Triton kernels alone.

The gated delta rule is computed token by token, as Yang et al. define it (arXiv 2412.06464), and
with a decay for each key dim, as Kimi Linear has it (arXiv 2510.26692).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_batchllm.edge.platform.recurrence import convolve, passes

NORM_EPSILON = 1e-6
"""Of queries and keys, whose length is 1 in every such layer."""


class DeltaNet(ABC):
    """Layers of the delta rule, in torch and float32. State slots hold, of each layer, the last
    inputs of the convolution and the state, [value heads, value dim, key dim]."""

    req_to_token_pool: Any
    forward_metadata: Any

    @abstractmethod
    def inputs_before(self, conv: torch.Tensor) -> torch.Tensor:
        """The last inputs of a request's convolution as [channels, width - 1]. conv: its slot."""

    def forward_extend(
        self,
        layer: Any,
        forward_batch: ForwardBatch,
        mixed_qkv: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """mixed_qkv: [tokens, channels]; a: of each token and value head one number, or one for
        each of its key dims; b: of each token and value head. Returns [1, tokens, value heads,
        value dim]."""
        counts, goes_on = passes(forward_batch)
        states = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        slots = self.forward_metadata.mamba_cache_indices.tolist()
        tokens, heads = len(mixed_qkv), layer.num_v_heads
        steps = F.softplus(a.reshape(tokens, -1).float() + layer.dt_bias.float())
        decays = -layer.A_log.float().view(heads, 1).exp() * steps.view(tokens, heads, -1)
        rates = b.reshape(tokens, heads).float().sigmoid()
        outputs = []
        parts = (x.split(counts) for x in (mixed_qkv.float(), decays, rates))
        for slot, old, x, decay, rate in zip(slots, goes_on, *parts, strict=True):
            if not old:
                states.conv[0][slot] = 0
                states.temporal[slot] = 0
            before = self.inputs_before(states.conv[0][slot])
            x = convolve(x, before, layer.conv_weights, layer.bias)
            q, k, v = x.split([layer.q_dim, layer.k_dim, layer.v_dim], dim=-1)
            share = heads // layer.num_k_heads
            q, k = (
                _unit(y.view(len(x), -1, layer.head_k_dim)).repeat_interleave(share, dim=1)
                for y in (q, k)
            )
            v = v.view(len(x), -1, layer.head_v_dim)
            outputs.append(
                _delta_rule(q * layer.head_k_dim**-0.5, k, v, decay, rate, states.temporal[slot])
            )
        return torch.cat(outputs).to(mixed_qkv.dtype)[None]

    forward_decode = forward_extend


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + NORM_EPSILON)


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decays: torch.Tensor,
    rates: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """q, k: [tokens, heads, key dim]; v: [tokens, heads, value dim]; decays: [tokens, heads, key
    dim or 1], of the state, as logarithms; rates: [tokens, heads], of learning; state: [heads,
    value dim, key dim], changed in place. Returns as v."""
    now = state.float()
    outputs = []
    for q_i, k_i, v_i, decay, rate in zip(q, k, v, decays, rates, strict=True):
        now = now * decay.exp()[:, None]
        error = v_i - torch.einsum("hvk,hk->hv", now, k_i)
        now = now + torch.einsum("hv,hk->hvk", error * rate[:, None], k_i)
        outputs.append(torch.einsum("hvk,hk->hv", now, q_i))
    state.copy_(now)
    return torch.stack(outputs)
