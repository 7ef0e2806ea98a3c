"""What kind of model it is, and of its prefill."""

from __future__ import annotations

from typing import Any


def is_mla(model: Any) -> bool:
    """Whether a ModelConfig's attention is multi-head latent attention."""
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.MLA


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
