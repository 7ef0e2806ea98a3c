"""Whole engines on NVIDIA GPUs: `--batchllm` gives the outputs of stock SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines import CONTEXT_LENGTH, VOCAB_SIZE
from prompts import mixed_batch
from tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OUTPUT = 24
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefill graphs": {
        "cuda_graph_backend_prefill": "breakable",
        "cuda_graph_bs_prefill": [64, 256, 1024],
    },
    "large graphs": {"cuda_graph_bs_decode": [1, 64, 2048], "max_running_requests": 2048},
    "mixed chunks": {"enable_mixed_chunk": True, "chunked_prefill_size": 512},
    "scarce": {"max_total_tokens": 4096, "chunked_prefill_size": 512},
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "tensor parallel": {"tp_size": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama-gpu")
    texts = [Path.__doc__ or ""]
    return make_tiny_model(folder, texts, VOCAB_SIZE, CONTEXT_LENGTH, hidden_size=256, head_dim=64)


def outputs(model: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    import sglang

    engine = sglang.Engine(
        model_path=str(model),
        dtype="bfloat16",
        disable_prefill_cuda_graph=True,
        mem_fraction_static=0.5,
        **options,
    )
    try:
        sampling = {"temperature": 0, "max_new_tokens": OUTPUT, "ignore_eos": True}
        results = engine.generate(input_ids=prompts, sampling_params=sampling)
    finally:
        engine.shutdown()
    return [result["output_ids"] for result in results]


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_of_stock_sglang(mode: str, model: Path) -> None:
    options = MODES[mode]
    if options.get("tp_size", 1) > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    prompts = mixed_batch(2000 if mode == "large graphs" else 600)
    fused = outputs(model, prompts, batchllm=True, batchllm_attention="fused", **options)
    stock = outputs(model, prompts, **options)
    assert all(len(ids) == OUTPUT for ids in fused)
    equal = sum(
        a == b
        for ours, theirs in zip(fused, stock, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    agreement = equal / (OUTPUT * len(prompts))
    print(f"{mode}: {agreement:.4f} of the tokens agree")
    # Both round to bf16 in their own order: a near-tie now and then sends a request elsewhere.
    # With an fp8 cache fa3 rounds the queries to fp8 too, which ours does not.
    assert agreement > (0.75 if mode == "fp8" else 0.9)
