"""Tiny random models of many families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tiny_model import train_tokenizer

WINDOW = 24
"""Tokens that a sliding-window layer sees."""

LAYERS = 4

PATCH = 16
"""Of an image, a side in pixels; two by two are a token."""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_WINDOWS = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_STATES = {
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    "full_attention_interval": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,  # SGLang splits 1, 2 and 4 to a key by a kernel of a GPU
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class Family(NamedTuple):
    """kind, config: the ``model_type`` of transformers, and what the tiny model's configuration
    says beside its sizes. options: that an engine needs to run it on a CPU. windowed: SGLang has a
    pool of its own for the sliding-window layers. recurrent: some layers keep a state instead.
    vision: the configuration of the part that reads images, if it has one. published: what stands
    in the files that people publish where transformers writes otherwise; None is not there."""

    kind: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    windowed: bool = False
    recurrent: bool = False
    vision: Mapping[str, Any] | None = None
    published: Mapping[str, Any] = MappingProxyType({})


FAMILIES = {
    "Llama": Family("llama", {}, {}),
    "Qwen2": Family("qwen2", {}, {}),
    "Qwen3": Family("qwen3", {}, {}),
    "Mistral": Family("mistral", {"sliding_window": None}, {}),
    "Gemma 2": Family(
        "gemma2",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": None,
            "hidden_act": "gelu_pytorch_tanh",  # SGLang reads the older of its two names
        },
        {},
    ),
    "Gemma 3": Family("gemma3_text", _WINDOWS | {"query_pre_attn_scalar": 16}, {}),
    "Gemma 4": Family(
        "gemma4_text",
        _WINDOWS
        | {
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": None,
            "swa_head_dim": 16,  # as SGLang derives them from a whole Gemma 4
            "swa_num_key_value_heads": 2,
        },
        {},
        windowed=True,
    ),
    "gpt-oss": Family(
        "gpt_oss",
        _WINDOWS | {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0},
        {"moe_runner_backend": "triton"},
        windowed=True,
    ),
    "Mellum": Family(
        "mellum",
        _WINDOWS
        | _EXPERTS
        | {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
        {},
        windowed=True,
    ),
    "Qwen3-MoE": Family("qwen3_moe", _EXPERTS | {"norm_topk_prob": True}, {}),
    "Qwen3-Next": Family(
        "qwen3_next",
        _EXPERTS | _STATES | {"shared_expert_intermediate_size": 32, "norm_topk_prob": True},
        {},
        recurrent=True,
    ),
    "Qwen3.5": Family(
        "qwen3_5",
        _STATES
        | {
            "partial_rotary_factor": 0.5,
            "rope_parameters": _ROPE
            | {
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        {"mm_attention_backend": "sdpa", "disable_fast_image_processor": True},
        recurrent=True,
        vision={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "deepstack_visual_indexes": [],
        },
    ),
    "Nemotron-H": Family(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
            "use_mamba_kernels": False,
            "mamba_num_heads": 8,  # SGLang derives it from `expand`
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
        {},
        recurrent=True,
        published={
            "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
            "mtp_layers_block_type": None,
            "mamba_n_groups": 2,
        },
    ),
    "Falcon-H1": Family(
        "falcon_h1",
        {
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
            "mamba_chunk_size": 32,
            "embedding_multiplier": 2.0,
            "lm_head_multiplier": 0.5,
            "key_multiplier": 0.5,
            "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 0.9,
            "mlp_multipliers": [0.9, 0.7],
            "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.75,
        },
        {},
        recurrent=True,
    ),
    "Kimi-Linear": Family(
        "kimi_linear",
        {
            "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.0,  # SGLang's experts in torch leave it out
        },
        {},
        recurrent=True,
        published={
            "layer_types": None,
            "mlp_layer_types": None,
            "mla_use_nope": True,
            "first_k_dense_replace": 1,
            "moe_router_activation_func": "sigmoid",
            "linear_attn_config": {
                "kda_layers": [1, 3],  # counted from 1
                "full_attn_layers": [2, 4],
                "head_dim": 16,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    "Mixtral": Family("mixtral", {"num_local_experts": 4, "sliding_window": None}, {}),
    "DeepSeek-V2": Family(
        "deepseek_v2",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
        {},
        published={"moe_layer_freq": 1, "scoring_func": "softmax"},
    ),
}


def make_model(
    family: str, folder: Path, vocab_size: int, context_length: int, **sizes: Any
) -> Path:
    """Write a float32 model, the same every time, and a tokenizer into `folder`. sizes: other than
    those above."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.integrations import hub_kernels
    from transformers.utils import logging

    hub_kernels._HUB_KERNEL_MAPPING.clear()  # some models would fetch theirs
    logging.disable_progress_bar()
    train_tokenizer(folder, [__doc__ or ""], vocab_size)
    made = FAMILIES[family]
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": context_length, **sizes}
    texts = _SIZES | dict(made.config) | sizes
    torch.manual_seed(0)
    if made.vision is None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(made.kind, **texts))
    else:
        sees = dict(made.vision) | {"out_hidden_size": texts["hidden_size"]}
        parts = {"text_config": texts, "vision_config": sees, **_see(folder)}
        config = AutoConfig.for_model(made.kind, **parts)
        model = AutoModelForImageTextToText.from_config(config)
    model = model.float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.copy_(torch.randn_like(weight).bfloat16())  # as SGLang keeps them
            elif weight.dim() > 1 and "embed" not in name and "A_log" not in name:
                weight.mul_(4.0)  # far from ties, and so that attention tells tokens apart
    model.save_pretrained(folder)
    if made.published:
        _write_as_published(folder, made.published)
    return folder


def _write_as_published(folder: Path, published: Mapping[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    written = folder / "config.json"
    config = json.loads(written.read_text()) | published
    dropped = {name for name, x in published.items() if x is None}
    written.write_text(json.dumps({name: config[name] for name in config.keys() - dropped}))
    weights = load_file(folder / "model.safetensors")
    # Releases of transformers leave out an s of Nemotron-H, and call Kimi's dense layers sparse.
    misnamed = {"backbone.embedding.": "backbone.embeddings."}
    for part in ("gate", "up", "down"):
        misnamed[f"block_sparse_moe.{part}_proj."] = f"mlp.{part}_proj."
    for name in [*weights]:
        for wrong, right in misnamed.items():
            if wrong in name:
                weights[name.replace(wrong, right)] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _see(folder: Path) -> dict[str, int]:
    """Write a processor of images into `folder`; returns the token ids that stand for them, by the
    names that they have in configurations."""
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*names.values()]})
    tokenizer.pad_token = tokenizer.eos_token
    images = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=2, min_pixels=(2 * PATCH) ** 2)
    Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor()).save_pretrained(folder)
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
