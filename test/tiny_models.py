"""Tiny random models of many families, by the names of `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tiny_model import train_tokenizer

WINDOW = 24
"""Tokens that a sliding-window layer sees."""

LAYERS = 4
_LAYER_TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _gemma2() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(
        **_SIZES,
        hidden_act="gelu_pytorch_tanh",  # SGLang reads the older of its two names
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=None,
    )


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **_SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=_LAYER_TYPES,
    )


def _gemma4() -> Any:
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **_SIZES,
        head_dim=16,
        global_head_dim=16,
        num_global_key_value_heads=2,
        sliding_window=WINDOW,
        layer_types=_LAYER_TYPES,
        hidden_size_per_layer_input=0,
        swa_head_dim=16,  # as SGLang derives them from a whole Gemma4Config
        swa_num_key_value_heads=2,
        num_kv_shared_layers=0,
        final_logit_softcapping=None,
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **_SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=7.0,
        sliding_window=WINDOW,
        layer_types=_LAYER_TYPES,
    )


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(**_SIZES, head_dim=16, num_local_experts=4, sliding_window=None)


def _deepseek_v2() -> Any:
    from transformers import DeepseekV2Config

    sizes = _SIZES | {"num_key_value_heads": 4}
    return DeepseekV2Config(
        **sizes,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    )


def _mellum() -> Any:
    from transformers import MellumConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return MellumConfig(
        **_SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        sliding_window=WINDOW,
        layer_types=_LAYER_TYPES,
        rope_parameters=dict.fromkeys(("sliding_attention", "full_attention"), rope),
    )


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_SIZES, head_dim=16, sliding_window=None)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_SIZES, head_dim=16)


class Family(NamedTuple):
    """config: of a tiny model. options: that an engine needs to run it on a CPU."""

    config: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})


FAMILIES = {
    "Qwen3": Family(_qwen3),
    "Mistral": Family(_mistral),
    "Gemma 2": Family(_gemma2),
    "Gemma 3": Family(_gemma3),
    "Gemma 4": Family(_gemma4),
    "gpt-oss": Family(_gpt_oss, {"moe_runner_backend": "triton"}),
    "Mellum": Family(_mellum),
    "Qwen3-MoE": Family(_qwen3_moe),
    "Mixtral": Family(_mixtral),
    "DeepSeek-V2": Family(_deepseek_v2),
}

WINDOWED = ["Mellum", "gpt-oss", "Gemma 4"]
"""Those for which SGLang has a pool of its own for sliding-window layers."""


def make_model(family: str, folder: Path, vocab_size: int, context_length: int) -> Path:
    """Write a float32 model, the same every time, and a tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    train_tokenizer(folder, [__doc__ or ""], vocab_size)
    config = FAMILIES[family].config()
    config.vocab_size = vocab_size
    config.max_position_embeddings = context_length
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_()
            elif weight.dim() > 1 and "embed" not in name:
                weight.mul_(4.0)  # far from ties, and so that attention tells tokens apart
    model.save_pretrained(folder)
    return folder
