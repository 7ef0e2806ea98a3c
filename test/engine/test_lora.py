"""LoRA: each adapter's requests share among themselves, with and without logprobs, as in stock."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapters import make_adapter
from engines import AMPLE, flush
from processes import in_scheduler, results_of
from prompts import distinct_tokens
from test_scoring import asks, assert_same_logprobs, computed, scored_batch

ADAPTERS = ("first", "second")


def pin_nothing() -> None:
    """SGLang 0.5.17 pins what LoRA copies to the device, which takes an NVIDIA driver."""

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def made(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return make(*args, **options)

        return made

    for name in ("tensor", "empty", "zeros", "arange"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]


def run(model: str, options: dict[str, Any], batches: list[dict[str, Any]], pipe: Any) -> None:
    """In a process of its own: the answers to each of `batches`."""
    from sglang.srt.entrypoints.engine import Engine

    class Unpinned(Engine):
        pass

    in_scheduler(Unpinned, pin_nothing)
    engine = Unpinned(
        model_path=model,
        dtype="float32",
        max_total_tokens=AMPLE,
        lora_backend="torch_native",
        max_loras_per_batch=3,
        **options,
    )
    try:
        for batch in batches:
            flush(engine)
            pipe.send(engine.generate(**batch))
    finally:
        engine.shutdown()


def test_adapters_share_among_their_own(tiny_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(ADAPTERS):
        make_adapter(tiny_model, tmp_path / name, seed)
    options = {"lora_paths": [f"{name}={tmp_path / name}" for name in ADAPTERS]}
    prompts = scored_batch(150)
    of = [(*ADAPTERS, None)[index % 3] for index in range(len(prompts))]
    sampling = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    common = {"input_ids": prompts, "lora_path": of, "sampling_params": sampling}
    batches = [common, common | asks(prompts, with_ids=False)]
    ours = list(results_of(run, str(tiny_model), options | {"batchllm": True}, batches))
    stock = list(results_of(run, str(tiny_model), options, batches))
    distinct = sum(
        distinct_tokens([prompt for prompt, own in zip(prompts, of, strict=True) if own == adapter])
        for adapter in (*ADAPTERS, None)
    )
    for mine, theirs in zip(ours, stock, strict=True):
        assert_same_logprobs(mine, theirs)
        assert computed(mine) == distinct
    plain = next(results_of(run, str(tiny_model), options, [common | {"lora_path": None}]))
    changed = sum(a["output_ids"] != b["output_ids"] for a, b in zip(stock[0], plain, strict=True))
    assert changed > len(prompts) / 2, "the adapters do nothing"
