"""What kind of model it is, and of its prefill."""

from __future__ import annotations

from typing import Any

MOST_LATENT_HEADS = 32
"""Query heads on one latent KV: with more, those of one request are enough to keep tensor cores
busy while its KV is read, and reading it for several at once saves little."""
LATENT_BACKENDS = ("fa3", "flashinfer", "triton")
"""Attention backends of SGLang's that keep latents token by token, as decode of ours reads them."""


def decodes_natively(model: Any, args: Any) -> bool:
    """Whether a ModelConfig's attention is multi-head latent attention of a kind whose decode is
    better left to SGLang. args: SGLang's arguments, resolved."""
    from sglang.srt.configs.model_config import AttentionArch

    if model.attention_arch != AttentionArch.MLA:
        return False
    heads = model.get_num_attention_heads(args.tp_size)
    return args.attention_backend not in LATENT_BACKENDS or heads > MOST_LATENT_HEADS


def has_compressed_attention(model: Any) -> bool:
    """Whether a ModelConfig's attention reads compressed KV, in pools of its own."""
    return model.is_hybrid_swa and model.is_deepseek_v4_arch


def has_only_windows(model: Any) -> bool:
    """Whether all layers of a ModelConfig that SGLang gives a window pool see a window."""
    return model.is_hybrid_swa and not model.full_attention_layer_ids


def has_recurrent_state(model: Any) -> bool:
    """Whether a ModelConfig's layers keep Mamba or linear-attention state."""
    from sglang.srt.configs import hybrid_arch

    finders = (
        hybrid_arch.hybrid_gdn_config,
        hybrid_arch.mamba2_config,
        hybrid_arch.kimi_linear_config,
        hybrid_arch.hybrid_lightning_config,
        hybrid_arch.linear_attn_model_spec,
    )
    return any(find(model) is not None for find in finders)


def prefill_is_compiled(graphs: Any) -> bool:
    """Whether prefill runs through torch.compile, cut at attention into CUDA graphs. graphs: a
    CudaGraphConfig."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    return graphs is not None and graphs.prefill.backend == Backend.TC_PIECEWISE
