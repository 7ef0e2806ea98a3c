"""Which models and layers decode through the fused kernel, and why others do not."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_batchllm.edge.args import resolved


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """A model's attention layers, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def full_attention_pool(pool: Any) -> Any:
    """The pool of the layers without a window (``SWAKVPool`` holds one beside the windowed one)."""
    return getattr(pool, "full_kv_pool", pool)


def layer_refusal(layer: RadixAttention) -> str | None:
    """Why a layer's decode can not be fused, or None."""
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return "sliding window"
    if layer.is_cross_attention:
        return "cross attention"
    if layer.attn_type == AttentionType.ENCODER_ONLY:
        return "encoder-only attention"
    if layer.v_head_dim != layer.head_dim or layer.head_dim > 256:
        return f"head dimensions {layer.head_dim} and {layer.v_head_dim}"
    if getattr(layer, "xai_temperature_len", -1) > 0:
        return "attention temperature"
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        return f"logit capping by {layer.logit_capping_method}"
    if layer.use_irope:
        return "chunked local attention"
    return None


def model_refusal(model_runner: Any) -> str | None:
    """Why nothing of a model's decode can be fused, or None."""
    args = resolved(model_runner.server_args)
    if model_runner.use_mla_backend:
        return "multi-head latent attention"
    if args.speculative_algorithm is not None:
        return "speculative decoding"
    if args.enable_deterministic_inference:
        return "deterministic inference (split sizes follow the batch)"
    if getattr(args, "dcp_size", 1) > 1:
        return "decode context parallelism"
    if model_runner.model_config.is_encoder_decoder:
        return "an encoder-decoder model"
    pool = full_attention_pool(model_runner.token_to_kv_pool)
    # By name, not isinstance: the subclasses are other layouts, quantized or virtual.
    if type(pool).__name__ != "MHATokenToKVPool":
        return f"the KV pool {type(pool).__name__}"
    device = model_runner.req_to_token_pool.req_to_token.device
    if pool.dtype == torch.float8_e4m3fn and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"an fp8_e4m3 KV cache on a GPU of compute capability {major}.{minor}"
    if pool.is_quantized_kv_cache:
        return "a KV cache packed in blocks"
    if pool.kv_cache_layout != "nhd":
        return f"the KV layout {pool.kv_cache_layout}"
    layers = attention_layers(model_runner.model)
    if not layers:
        return "a model without attention layers"
    reasons = [layer_refusal(layer) for layer in layers]
    if all(reason is not None for reason in reasons):
        return str(reasons[0])
    return None
