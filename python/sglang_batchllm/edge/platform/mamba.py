"""Mamba layers of the CPU reference platform: what SGLang has as Triton kernels alone.

The state space is computed token by token, as Dao and Gu define it (arXiv 2405.21060).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.hybrid_linear_attn_backend import Mamba2AttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_batchllm.edge.platform.recurrence import convolve, passes


class CpuMamba(Mamba2AttnBackend):
    """SGLang's backend for such layers, in torch and float32. State slots hold, of each layer, the
    last inputs of the convolution, [channels, width - 1], and the state, [heads, head dim, state
    size]."""

    def forward(
        self,
        mixer: Any,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        layer_id: int,
        forward_batch: ForwardBatch,
        mup_vector: torch.Tensor | None = None,
        use_triton_causal_conv: bool = False,
    ) -> torch.Tensor:
        assert mixer.tp_size == 1, "Mamba layers run on one rank here"
        states = self.req_to_token_pool.mamba2_layer_cache(layer_id)
        slots = self.forward_metadata.mamba_cache_indices.tolist()
        inside = mixer.in_proj(hidden_states)[0]
        if mup_vector is not None:
            inside = inside * mup_vector
        sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
        gate, mixed, dt = inside.split(sizes, dim=-1)
        steps = F.softplus(dt.float() + mixer.dt_bias.float())
        counts, goes_on = passes(forward_batch)
        outputs = []
        parts = (x.split(counts) for x in (mixed.float(), steps))
        for slot, old, x, step in zip(slots, goes_on, *parts, strict=True):
            if not old:
                states.conv[0][slot] = 0
                states.temporal[slot] = 0
            x = convolve(x, states.conv[0][slot], mixer.conv1d.weight[:, 0], mixer.conv1d.bias)
            outputs.append(_scan(mixer, x, step, states.temporal[slot]))
        y = mixer.norm(torch.cat(outputs).to(hidden_states.dtype), gate)
        result = mixer.out_proj(y)[0]
        if output is not None:
            output[: len(result)] = result
        return result


def _scan(mixer: Any, x: torch.Tensor, steps: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """x: [tokens, channels] of inputs, B and C; steps: [tokens, heads]; state: [heads, head dim,
    state size], changed in place. Returns [tokens, heads * head dim]."""
    groups = mixer.groups_ssm_state_size
    x, b, c = x.split([mixer.intermediate_size, groups, groups], dim=-1)
    x = x.view(len(x), mixer.num_heads, mixer.head_dim)
    share = mixer.num_heads // mixer.n_groups
    b, c = (
        y.view(len(y), mixer.n_groups, mixer.ssm_state_size).repeat_interleave(share, dim=1)
        for y in (b, c)
    )
    decays = (steps * mixer.A.float()).exp()
    now = state.float()
    outputs = []
    for x_i, b_i, c_i, step, decay in zip(x, b, c, steps, decays, strict=True):
        now = now * decay[:, None, None] + torch.einsum("hp,hn->hpn", x_i * step[:, None], b_i)
        outputs.append(torch.einsum("hpn,hn->hp", now, c_i) + mixer.D.float()[:, None] * x_i)
    state.copy_(now)
    return torch.stack(outputs).flatten(1)
