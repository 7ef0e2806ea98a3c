"""Tensor parallelism on CPUs: two ranks, each with a plan of its own, answer as one does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engines import AMPLE, CONTEXT_LENGTH, VOCAB_SIZE, flush
from processes import results_of
from prompts import distinct_tokens, mixed_batch
from test_scoring import asks, computed, same, scored_batch
from tiny_models import make_model

SAMPLING = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
"""Up to there the logits of the two likeliest tokens differ by 0.0009 or more everywhere; of one
prompt's eleventh by a millionth."""


def batches(count: int) -> list[dict[str, Any]]:
    """Two of so many prompts. Logprobs differ in their last digits, as sums are of two parts."""
    scored = scored_batch(count)
    return [
        {"input_ids": mixed_batch(count), "sampling_params": SAMPLING},
        {"input_ids": scored, "sampling_params": SAMPLING} | asks(scored, with_ids=False),
    ]


def run(model: str, count: int, options: dict[str, Any], pipe: Any) -> None:
    """In a process of its own: the answers to each batch."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(model_path=model, dtype="float32", max_total_tokens=AMPLE, **options)
    try:
        answers = []
        for batch in batches(count):
            flush(engine)
            answers.append(engine.generate(**batch))
        pipe.send(answers)
    finally:
        engine.shutdown()


def on_two_ranks(model: Path, count: int, **options: Any) -> None:
    """Two ranks answer as one of stock SGLang does, and compute each distinct prompt token once."""
    (stock,) = results_of(run, str(model), count, {})
    cores = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        # SGLang wants a core named for each rank, and takes NCCL wherever it is installed.
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
        patch.setenv("SGLANG_NCCL_SO_PATH", "none")
        parallel = {"tp_size": 2, "batchllm": True, "chunked_prefill_size": 96, **options}
        parallel["log_level"] = "debug"  # each rank checks that all would prefill the same
        (ours,) = results_of(run, str(model), count, parallel)
    for batch, mine, theirs in zip(batches(count), ours, stock, strict=True):
        assert [one["output_ids"] for one in mine] == [one["output_ids"] for one in theirs]
        for one, other in zip(mine, theirs, strict=True):
            logprobs = other["meta_info"].get("input_token_logprobs")
            assert same(one["meta_info"].get("input_token_logprobs"), logprobs)
        assert computed(mine) == distinct_tokens(batch["input_ids"])


def test_two_ranks_share_and_score_as_one(tiny_model: Path) -> None:
    on_two_ranks(tiny_model, 150)


def test_so_they_do_with_half_of_the_experts_each(tmp_path: Path) -> None:
    """Of more prompts a router's or a token's two likeliest come nearer to each other."""
    sizes = {"moe_intermediate_size": 128}  # SGLang takes no narrower ones apart on a CPU
    model = make_model("Qwen3-MoE", tmp_path / "model", VOCAB_SIZE, CONTEXT_LENGTH, **sizes)
    on_two_ranks(model, 60, ep_size=2)
