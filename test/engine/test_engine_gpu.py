"""Whole engines on NVIDIA GPUs: `--batchllm` decodes as exactly as stock SGLang does.

Both round to 16 or 8 bits, each in its own order. So both are compared with transformers in float32
along one given continuation, and ours may be no further from that than stock SGLang is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import CONTEXT_LENGTH, VOCAB_SIZE
from forced_decode import force_decode, logprobs_of, model_of, true_logprobs
from prompts import mixed_batch
from tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OUTPUT = 24
SHARPNESS = 4
"""Queries and keys of the random model times this: else it attends to all tokens nearly alike, and
a wrong scale is lost in rounding. With it, scores that are 1% too large add half to the error of
bfloat16, and values that are 10% too large make it seven times as large."""

MOST_RMS, MOST_MAX = 1.25, 2.0
"""Times stock SGLang's root mean square error over some 200,000 logprobs, which differs by 1%
between engines that are right, and times its largest, which is that of one of them."""

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefill graphs": {
        "cuda_graph_backend_prefill": "breakable",
        "cuda_graph_bs_prefill": [64, 256, 1024],
        "disable_prefill_cuda_graph": False,
    },
    "large graphs": {"cuda_graph_bs_decode": [1, 64, 2048], "max_running_requests": 2048},
    "mixed chunks": {"enable_mixed_chunk": True, "chunked_prefill_size": 512},
    "scarce": {"max_total_tokens": 4096, "chunked_prefill_size": 512},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "tensor parallel": {"tp_size": 2},
}

Errors = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama-gpu")
    texts = [Path.__doc__ or ""]
    make_tiny_model(folder, texts, VOCAB_SIZE, CONTEXT_LENGTH, hidden_size=256, head_dim=64)
    sharp = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in sharp.model.layers:
            layer.self_attn.q_proj.weight.mul_(SHARPNESS)
            layer.self_attn.k_proj.weight.mul_(SHARPNESS)
    sharp.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def errors(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """What an engine with these options is off by, float64[prompts, OUTPUT, probes]; starts each
    engine once."""
    path = tmp_path_factory.mktemp("forced") / "logprobs"
    reference = model_of(model, rounded=True, device="cuda")

    @functools.cache
    def prompts_and_truth(count: int) -> tuple[list[list[int]], np.ndarray]:
        prompts = mixed_batch(count)
        return prompts, true_logprobs(reference, prompts, OUTPUT, VOCAB_SIZE)

    def errors_of(count: int, **options: Any) -> np.ndarray:
        from sglang.srt.entrypoints.engine import Engine

        class ForcedEngine(Engine):
            pass

        force_decode(ForcedEngine, path)
        engine = ForcedEngine(
            model_path=str(model),
            dtype="bfloat16",
            mem_fraction_static=0.5,
            **{"disable_prefill_cuda_graph": True, **options},  # they take long to capture
        )
        prompts, truth = prompts_and_truth(count)
        try:
            found = logprobs_of(engine, path, prompts, OUTPUT, VOCAB_SIZE)
        finally:
            engine.shutdown()
        return np.abs(found - truth)

    return errors_of


@pytest.fixture(scope="module")
def stock_errors(errors: Errors) -> Errors:
    return functools.cache(lambda kv_dtype: errors(600, kv_cache_dtype=kv_dtype))


@pytest.mark.parametrize("mode", MODES)
def test_decode_is_as_exact_as_in_stock_sglang(
    mode: str, errors: Errors, stock_errors: Errors
) -> None:
    options = MODES[mode]
    if options.get("tp_size", 1) > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    count = 2000 if mode == "large graphs" else 600
    stock = stock_errors(options.get("kv_cache_dtype", "auto"))
    ours = errors(count, batchllm=True, batchllm_attention="fused", **options)
    rms = [float(np.sqrt((off**2).mean())) for off in (ours, stock)]
    largest = [float(off.max()) for off in (ours, stock)]
    print(f"{mode}, ours and stock: rms {rms}, largest {largest}")
    assert rms[0] < MOST_RMS * rms[1]
    assert largest[0] < MOST_MAX * largest[1]
