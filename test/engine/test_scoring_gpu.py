"""Logprobs of shared prompts on NVIDIA GPUs: as exact as those of stock SGLang.

As in test_engine_gpu.py: both are compared with transformers, whose weights are rounded alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import make_adapter
from engines import CONTEXT_LENGTH, VOCAB_SIZE
from forced_decode import model_of
from processes import results_of
from prompts import distinct_tokens
from test_scoring import computed, scored_batch
from tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ADAPTERS = ("first", "second")

MOST_RMS, MOST_MAX = 1.25, 2.0
"""Times stock SGLang's errors."""

Scores = list[np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama-scored")
    texts = [Path.__doc__ or ""]
    return make_tiny_model(folder, texts, VOCAB_SIZE, CONTEXT_LENGTH, hidden_size=256, head_dim=64)


def true_scores(model: Any, prompts: Sequence[list[int]]) -> Scores:
    """Logprobs of each prompt's tokens but the first."""
    scores = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            said = model(ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(said.gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
    return scores


def run(
    model: str,
    options: dict[str, Any],
    prompts: list[list[int]],
    adapters: list[str | None] | None,
    pipe: Any,
) -> None:
    """In a process of its own: each prompt's logprobs, and prompt tokens computed."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=model,
        dtype="bfloat16",
        mem_fraction_static=0.4,
        max_total_tokens=60_000,
        disable_cuda_graph=True,  # one token is decoded
        disable_prefill_cuda_graph=True,
        **options,
    )
    try:
        results = engine.generate(
            input_ids=prompts,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=2,
            lora_path=adapters,
        )
        rows = [result["meta_info"]["input_token_logprobs"][1:] for result in results]
        pipe.send(([np.array([logprob for logprob, *_ in row]) for row in rows], computed(results)))
    finally:
        engine.shutdown()


def errors(found: Scores, truth: Scores) -> np.ndarray:
    return np.abs(np.concatenate(found) - np.concatenate(truth))


@pytest.mark.parametrize("mode", ["one GPU", "small chunks", "tensor parallel", "LoRA"])
def test_shared_logprobs_are_as_exact_as_in_stock_sglang(
    mode: str, model: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {}
    prompts = scored_batch(300)
    truth_of = model_of(model, True, "cuda")
    truth = true_scores(truth_of, prompts)
    adapters: list[str | None] | None = None
    distinct = distinct_tokens(prompts)
    if mode == "small chunks":
        options = {"chunked_prefill_size": 256}
    if mode == "tensor parallel":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        options = {"tp_size": 2}
    if mode == "LoRA":
        paths = {name: tmp_path / name for name in ADAPTERS}
        options = {
            "lora_paths": [f"{name}={path}" for name, path in paths.items()],
            "max_loras_per_batch": 3,
        }
        which: list[str | None] = [*ADAPTERS, None]
        adapters = [which[index % 3] for index in range(len(prompts))]
        for seed, name in enumerate(ADAPTERS):
            added = make_adapter(model, paths[name], seed)
            for layer, change in added.items():
                truth_of.get_submodule(layer).weight.data += change.to("cuda")
            own = [index for index, adapter in enumerate(adapters) if adapter == name]
            scores = true_scores(truth_of, [prompts[index] for index in own])
            assert np.abs(scores[0] - truth[own[0]]).max() > 0.1, "the adapter does nothing"
            for index, score in zip(own, scores, strict=True):
                truth[index] = score
            for layer, change in added.items():
                truth_of.get_submodule(layer).weight.data -= change.to("cuda")
        distinct = sum(
            distinct_tokens([p for p, one in zip(prompts, adapters, strict=True) if one == adapter])
            for adapter in which
        )
    off = {}
    for side, flags in (("ours", {"batchllm": True}), ("stock", {})):
        ((found, tokens),) = results_of(run, str(model), options | flags, prompts, adapters)
        off[side] = errors(found, truth)
        if side == "ours":
            assert tokens == distinct
    rms = {side: float(np.sqrt((error**2).mean())) for side, error in off.items()}
    largest = {side: float(error.max()) for side, error in off.items()}
    print(f"{mode}: rms {rms}, largest {largest}")
    assert rms["ours"] < MOST_RMS * rms["stock"]
    assert largest["ours"] < MOST_MAX * largest["stock"]
