"""Which models and layers decode through the fused kernel, and why others do not."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_batchllm.edge.args import resolved

MOST_LATENT_HEADS = 32
"""Query heads on one latent KV. By arithmetic those of one request are enough for the tensor cores
while its KV is read if they are a few times more, so that reading it for several saves little."""
LATENT_BACKENDS = (None, "torch_native", "fa3", "flashinfer", "triton")
"""Beside which it is fused. Run on a CPU (torch_native) and with fa3; others that SGLang has for it
want pages of their own."""
LATENT_MEMORY = 160 * 1024
"""Bytes of a multiprocessor's shared memory that tiles of 512 elements of latent take."""
BLACKWELL = 10
"""Compute capability for which Triton compiles such tiles to more than there is."""


def decoding_layers(model: torch.nn.Module, pool: Any) -> list[RadixAttention]:
    """A model's attention layers that decode, in the order of its modules. With latent attention
    there are others beside them, for prefill from keys and values themselves."""
    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    latent = latent_dim(pool)
    return [layer for layer in layers if latent in (None, layer.v_head_dim)]


def latent_dim(pool: Any) -> int | None:
    """Elements of a token's latent in a pool of multi-head latent attention."""
    return getattr(full_attention_pool(pool), "kv_lora_rank", None)


def full_attention_pool(pool: Any) -> Any:
    """The pool of the layers without a window (``SWAKVPool`` holds one beside the windowed one)."""
    return getattr(pool, "full_kv_pool", pool)


def window_of(layer: RadixAttention) -> int | None:
    """Tokens that a query of the layer attends to, its own the last; None for all."""
    size = layer.sliding_window_size  # tokens before its own
    return None if size is None or size < 0 else size + 1


def layer_refusal(layer: RadixAttention, pool: Any) -> str | None:
    """Why a layer's decode can not be fused, or None. pool: the model's."""
    latent = latent_dim(pool)
    if window_of(layer) is not None and full_attention_pool(pool) is not pool:
        return "sliding window"
    if layer.is_cross_attention:
        return "cross attention"
    if layer.attn_type == AttentionType.ENCODER_ONLY:
        return "encoder-only attention"
    if latent is not None:
        if layer.tp_q_head_num > MOST_LATENT_HEADS:
            return f"{layer.tp_q_head_num} query heads on one latent KV"
    elif layer.v_head_dim != layer.head_dim or layer.head_dim > 256:
        return f"head dimensions {layer.head_dim} and {layer.v_head_dim}"
    if getattr(layer, "xai_temperature_len", -1) > 0:
        return "attention temperature"
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        return f"logit capping by {layer.logit_capping_method}"
    if layer.use_irope:
        return "chunked local attention"
    return None


def _pool_refusal(pool: Any, device: torch.device) -> str | None:
    if pool.dtype == torch.float8_e4m3fn and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"an fp8_e4m3 KV cache on a GPU of compute capability {major}.{minor}"
    if pool.is_quantized_kv_cache:
        return "a KV cache packed in blocks"
    if pool.kv_cache_layout != "nhd":
        return f"the KV layout {pool.kv_cache_layout}"
    return None


def _latent_pool_refusal(pool: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    if pool.dtype != dtype:
        return f"a KV cache of {pool.dtype} with multi-head latent attention"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        if card.shared_memory_per_multiprocessor < LATENT_MEMORY or card.major >= BLACKWELL:
            return f"multi-head latent attention on {card.name}"
    return None


def model_refusal(model_runner: Any) -> str | None:
    """Why nothing of a model's decode can be fused, or None."""
    args = resolved(model_runner.server_args)
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
    if type(pool).__name__ not in ("MHATokenToKVPool", "MLATokenToKVPool"):
        return f"the KV pool {type(pool).__name__}"
    device = model_runner.req_to_token_pool.req_to_token.device
    latent = latent_dim(pool)
    if latent is None:
        reason = _pool_refusal(pool, device)
    elif args.attention_backend not in LATENT_BACKENDS:
        reason = f"multi-head latent attention with {args.attention_backend}"
    else:
        reason = _latent_pool_refusal(pool, model_runner.dtype, device)
    if reason is not None:
        return reason
    layers = decoding_layers(model_runner.model, pool)
    if not layers:
        return "a model without attention layers"
    reasons = [layer_refusal(layer, model_runner.token_to_kv_pool) for layer in layers]
    if all(reason is not None for reason in reasons):
        return str(reasons[0])
    return None
