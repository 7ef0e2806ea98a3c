"""A continuation that every engine decodes alike, whatever its rounding.

Two engines that round differently part at the first near-tie, and what they say after that can not
be compared. So here the sampled token is replaced, in the scheduler's process, by one that follows
from the token and the position before it, and the logprobs of some tokens at each position are
recorded: numbers of the same texts, to be compared with those of transformers in float32.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from processes import in_scheduler

PROBES = 16
"""Tokens whose logprobs are recorded, evenly over the vocabulary."""


def probes(vocab_size: int) -> list[int]:
    return list(range(0, vocab_size, vocab_size // PROBES))[:PROBES]


def successor(token: Any, position: Any, vocab_size: int) -> Any:
    """The token after `token` at `position`; numbers or arrays of them."""
    return (31 * token + 17 * position + 7) % vocab_size


def continuation(prompt: Sequence[int], tokens: int, vocab_size: int) -> list[int]:
    """What follows `prompt`, in every engine that is made to say so."""
    text = list(prompt)
    for position in range(len(prompt) - 1, len(prompt) - 1 + tokens):
        text.append(successor(text[-1], position, vocab_size))
    return text[len(prompt) :]


def force_decode(engine_class: Any, path: Path) -> None:
    """Engines made from `engine_class` from now on sample `successor`, and append to `path` a line
    for each forward step: the requests' ids, positions and logprobs of `probes`."""
    in_scheduler(engine_class, _force_decode, path)


def _force_decode(path: Path) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    sample = ModelRunner.sample
    file = path.open("a", buffering=1)

    def forced_sample(self: Any, logits_output: Any, forward_batch: Any) -> torch.Tensor:
        sampled = sample(self, logits_output, forward_batch)
        rows = forward_batch.batch_size
        logits = logits_output.next_token_logits[:rows].float()
        vocab_size = logits.shape[1]
        positions = forward_batch.seq_lens[:rows] - 1
        last = forward_batch.input_ids
        if not forward_batch.forward_mode.is_decode():
            last = last[forward_batch.extend_seq_lens.cumsum(0) - 1]
        if _parallel(self).tp_rank == 0:
            logprobs = logits.log_softmax(-1)[:, probes(vocab_size)]
            line = [forward_batch.rids, positions.tolist(), logprobs.tolist()]
            print(json.dumps(line), file=file)
        return successor(last[:rows], positions, vocab_size).to(sampled.dtype)

    ModelRunner.sample = forced_sample


def _parallel(runner: Any) -> Any:
    """Where the process stands among those of its model."""
    if hasattr(runner, "ps"):
        return runner.ps
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def read_logprobs(path: Path) -> dict[tuple[str, int], list[float]]:
    """Logprobs of the probes by request id and position of the last token before them."""
    return {
        (rid, position): values
        for line in path.read_text().splitlines()
        for rid, position, values in zip(*json.loads(line), strict=True)
    }


def logprobs_of(
    engine: Any, path: Path, prompts: Sequence[Sequence[int]], tokens: int, vocab_size: int
) -> np.ndarray:
    """Of an engine of `force_decode`: float64[prompts, tokens, PROBES], while it writes `tokens`
    tokens after each prompt."""
    path.write_text("")
    rids = [f"forced-{index}" for index in range(len(prompts))]
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    results = engine.generate(input_ids=list(prompts), sampling_params=sampling, rid=rids)
    for prompt, result in zip(prompts, results, strict=True):
        assert result["output_ids"] == continuation(prompt, tokens, vocab_size)
    found = read_logprobs(path)
    return np.array(
        [
            [found[rid, len(prompt) - 1 + step] for step in range(tokens)]
            for rid, prompt in zip(rids, prompts, strict=True)
        ]
    )


def true_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, vocab_size: int
) -> np.ndarray:
    """The same of a model of transformers: float64[prompts, tokens, PROBES]."""
    logprobs = []
    with torch.inference_mode():
        for prompt in prompts:
            text = [*prompt, *continuation(prompt, tokens, vocab_size)]
            logits = model(torch.tensor([text], device=model.device)).logits[0]
            said = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            logprobs.append(said[:, probes(vocab_size)].cpu().numpy())
    return np.stack(logprobs)


@functools.cache
def model_of(folder: Path, rounded: bool, device: str) -> Any:
    """The model of `folder` in transformers, in float32. rounded: its weights to bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return (model.bfloat16().float() if rounded else model).to(device)
