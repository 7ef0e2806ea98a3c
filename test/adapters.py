"""Tiny random LoRA adapters."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
STRENGTH = 0.1
"""Standard deviation of an adapter's factors: logprobs of a tiny model change by one or two."""


def make_adapter(model: Path, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Write an adapter for the Llama in `model`; what it adds to the weight of each layer by name.

    It is of the projections before attention: SGLang takes all three of them or none."""
    config = json.loads((model / "config.json").read_text())
    rng = torch.Generator().manual_seed(seed)
    heads = dict.fromkeys("kv", config["num_key_value_heads"]) | {
        "q": config["num_attention_heads"]
    }
    weights, added = {}, {}
    for layer, which in itertools.product(range(config["num_hidden_layers"]), "qkv"):
        name = f"model.layers.{layer}.self_attn.{which}_proj"
        wide = heads[which] * config["head_dim"]
        a = (torch.randn(RANK, config["hidden_size"], generator=rng) * STRENGTH).bfloat16()
        b = (torch.randn(wide, RANK, generator=rng) * STRENGTH).bfloat16()
        weights |= {f"base_model.model.{name}.lora_{x}.weight": w for x, w in (("A", a), ("B", b))}
        added[name] = b.float() @ a.float()
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    about["target_modules"] = [f"{which}_proj" for which in "qkv"]
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return added
