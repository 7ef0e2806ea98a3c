"""Families of models on an NVIDIA GPU: `--batchllm` decodes as exactly as stock SGLang does.

As in test_engine_gpu.py: both are compared with transformers along one given continuation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import CONTEXT_LENGTH, VOCAB_SIZE
from forced_decode import force_decode, logprobs_of, model_of, true_logprobs
from processes import results_of
from prompts import distinct_tokens, mixed_batch
from test_models import documented
from tiny_models import FAMILIES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPTS, OUTPUT = 200, 24
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
_EXPERTS = {"moe_intermediate_size": 128}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "Gemma 4": {"global_head_dim": 64, "swa_head_dim": 64},
    "Mellum": _EXPERTS,
    "Qwen3-MoE": _EXPERTS,
    "Qwen3-Next": _EXPERTS | _DELTA_NET | {"shared_expert_intermediate_size": 128},
    "Qwen3.5": _DELTA_NET,
    "Nemotron-H": {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64},
    "Falcon-H1": {
        "mamba_d_ssm": 512,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_chunk_size": 128,
    },
    "DeepSeek-V2": _EXPERTS
    | {
        "head_dim": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
"""That SGLang's kernels of a GPU take, and of the latter those of a family alone."""

MOST_RMS = 1.25
"""Times stock SGLang's root mean square error, which differs by some percent between engines that
are right: where a router's two best experts are near a tie, one token more or less goes astray."""

TESTED = [family for family, row in documented().items() if row["GPU"] == "yes"]


def run(model: str, options: dict[str, Any], path: Path, pipe: Any) -> None:
    """In a process of its own: an engine's logprobs, and prompt tokens computed, through `pipe`."""
    from sglang.srt.entrypoints.engine import Engine

    class ForcedEngine(Engine):
        pass

    force_decode(ForcedEngine, path)
    engine = ForcedEngine(
        model_path=model,
        dtype="bfloat16",
        mem_fraction_static=0.4,
        max_total_tokens=60_000,
        disable_prefill_cuda_graph=True,
        cuda_graph_bs_decode=[1, 16, 64, 256],  # each takes a second, and all are 68
        **{"moe_runner_backend": "triton", **options},  # others compile for minutes
    )
    try:
        prompts = mixed_batch(PROMPTS)
        found = logprobs_of(engine, path, prompts, OUTPUT, VOCAB_SIZE)
        computed = None
        if options.get("batchllm"):
            from sglang_batchllm import get_report

            computed = get_report(engine)["batches"][-1]["computed_tokens"]
        pipe.send((found, computed))
    finally:
        engine.shutdown()


def errors(family: str, folder: Path, **options: Any) -> dict[str, float]:
    """Of ours and of stock SGLang, both with these engine options: root mean squares of what
    logprobs are off by. Ours has computed each distinct prompt token once."""
    sizes = SIZES | OWN_SIZES.get(family, {})
    model = make_model(family, folder / "model", VOCAB_SIZE, CONTEXT_LENGTH, **sizes)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    prompts = mixed_batch(PROMPTS)
    truth = true_logprobs(model_of(model, True, "cuda"), prompts, OUTPUT, VOCAB_SIZE)
    options = {**FAMILIES[family].options, **options}
    rms = {}
    for side in ("ours", "stock"):
        flags = {"batchllm": True, "batchllm_attention": "fused"} if side == "ours" else {}
        ((found, computed),) = results_of(
            run, str(model), options | flags, folder / f"logprobs-{side}"
        )
        rms[side] = float(np.sqrt(((found - truth) ** 2).mean()))
        if side == "ours":
            assert computed == distinct_tokens(prompts)
    print(f"{family}: rms {rms}")
    return rms


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in TESTED])
def test_a_family_decodes_as_exactly_as_in_stock_sglang(family: str, tmp_path: Path) -> None:
    rms = errors(family, tmp_path)
    assert rms["ours"] < MOST_RMS * rms["stock"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_experts_on_two_gpus(expert_ranks: int, tmp_path: Path) -> None:
    rms = errors("Qwen3-MoE", tmp_path, tp_size=2, ep_size=expert_ranks)
    assert rms["ours"] < MOST_RMS * rms["stock"]
