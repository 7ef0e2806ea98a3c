"""Running requests that decode along in prefill steps: all with `--enable-mixed-chunk`, and short
answers without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines import flush
from prompts import distinct_tokens, mixed_batch
from steps import read_steps

OUTPUT = 6


def test_outputs_are_those_of_stock_sglang(
    mixing_engine: Any, stock_engine: Any, steps_file: Path
) -> None:
    """Plain requests, some with penalties, and with logprobs, which SGLang does not mix."""
    prompts = mixed_batch(150)
    sampling = [
        {"temperature": 0, "max_new_tokens": 4 + i % 17, "ignore_eos": True}
        | ({"frequency_penalty": 0.5} if i % 5 == 0 else {})
        for i in range(len(prompts))
    ]
    runs = {}
    for engine in (stock_engine, mixing_engine):
        flush(engine)
        runs[engine] = engine.generate(input_ids=prompts, sampling_params=sampling)
        with_logprobs = engine.generate(
            input_ids=prompts[:20], sampling_params=sampling[:20], return_logprob=True
        )
        runs[engine] += with_logprobs
    ids = {engine: [result["output_ids"] for result in results] for engine, results in runs.items()}
    assert ids[mixing_engine] == ids[stock_engine]
    infos = [result["meta_info"] for result in runs[mixing_engine][: len(prompts)]]
    computed = sum(info["prompt_tokens"] - info["cached_tokens"] for info in infos)
    assert computed == distinct_tokens(prompts)
    mixed = [s for s in read_steps(steps_file) if s.prefill_tokens and s.decode_requests]
    assert len(mixed) > 10


def test_the_last_layer_ends_in_one_row_per_request(
    mixing_engine: Any, steps_file: Path, last_layer_file: Path
) -> None:
    flush(mixing_engine)
    before = len(read_steps(steps_file))
    prompts = mixed_batch(40)
    mixing_engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 6})
    flush(mixing_engine)
    steps = read_steps(steps_file)[before:]
    rows = [int(line) for line in last_layer_file.read_text().splitlines()][before:]
    assert rows == [step.prefill_requests + step.decode_requests for step in steps]
    prefills = [step for step in steps if step.prefill_requests]
    rows_saved = sum(step.prefill_tokens - step.prefill_requests for step in prefills)
    assert rows_saved > sum(step.prefill_tokens for step in prefills) / 2


@pytest.mark.parametrize("asked", [{}, {"regex": "[a-f]{6}"}], ids=str)
def test_short_answers_ride_in_prefill_steps_unasked(
    scarce_engine: Any, stock_engine: Any, scarce_steps_file: Path, asked: dict[str, Any]
) -> None:
    prompts = mixed_batch(150)
    greedy = {"temperature": 0, "ignore_eos": True, "max_new_tokens": OUTPUT, **asked}
    outputs = {}
    before = len(read_steps(scarce_steps_file))
    for engine in (stock_engine, scarce_engine):
        flush(engine)
        results = engine.generate(input_ids=prompts, sampling_params=greedy)
        outputs[engine] = [result["output_ids"] for result in results]
    steps = read_steps(scarce_steps_file)[before:]
    mixed = [step for step in steps if step.prefill_tokens and step.decode_requests]
    alone = [step for step in steps if step.prefill_tokens and not step.decode_requests]
    assert outputs[scarce_engine] == outputs[stock_engine]
    assert len(mixed) > max(len(alone), 10), (len(mixed), len(alone))
    assert all(step.prefill_tokens + step.decode_requests <= 48 for step in mixed)
