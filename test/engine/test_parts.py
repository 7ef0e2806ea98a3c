"""Long lists run in parts while they are prepared, and come out as in one piece."""

import random
import time
from typing import Any

import pytest

from engines import flush
from prompts import distinct_tokens, mixed_batch
from sglang_batchllm.client.get_report import get_report
from sglang_batchllm.edge import lists, parting
from test_sharing import assert_pool_is_whole, computed_tokens, output_ids

PART = 12
"""Requests."""


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lists, parting):
        monkeypatch.setattr(module, "SLICE", PART)
    monkeypatch.setattr(parting, "OPENING_TOKENS", 400)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Requests of each part that is sent; what comes after the first waits for a step or two."""
    sent: list[int] = []
    send = lists.ListIntake.send_list

    async def note(self: Any, tokenized: list[Any]) -> None:
        await send(self, tokenized)
        sent.append(len(tokenized))
        time.sleep(0.05)

    monkeypatch.setattr(lists.ListIntake, "send_list", note)
    return sent


def without_beginnings(prompts: list[list[int]]) -> list[list[int]]:
    """Shuffled, without those that others continue: where such a one comes after the other has run,
    its last token is computed again, for which no plan can be blamed."""
    continued = {
        tuple(prompt[:end])
        for prompt in prompts
        for end in {*map(len, prompts)} & {*range(len(prompt))}
    }
    left = [prompt for prompt in prompts if tuple(prompt) not in continued]
    random.Random(3).shuffle(left)
    return left


def sampling(index: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": 1 + index % 7, "ignore_eos": True}


@pytest.mark.parametrize("kind", ["engine", "scarce_engine", "mixing_engine"])
def test_a_list_in_parts_is_as_one_in_one_piece(request, stock_engine, kind, parts):
    engine = request.getfixturevalue(kind)
    prompts = without_beginnings(mixed_batch(240))
    params = [sampling(index) for index in range(len(prompts))]
    flush(engine)
    results = engine.generate(input_ids=prompts, sampling_params=params)
    assert len(parts) > 10
    assert sum(parts) == len(prompts)
    expected = stock_engine.generate(input_ids=prompts, sampling_params=params)
    assert output_ids(results) == output_ids(expected)
    report = get_report(engine)
    last = report["batches"][-1]
    print(f"\n{kind}: {computed_tokens(results):,} computed, {last}")
    if kind != "scarce_engine":
        assert computed_tokens(results) == distinct_tokens(prompts)
    assert last["computed_tokens"] == computed_tokens(results)
    assert last["distinct_tokens"] == distinct_tokens(prompts)
    assert last["finished"] == last["requests"] == len(prompts)
    assert last["prompt_tokens"] == sum(map(len, prompts))
    assert report["running"] == []
    assert_pool_is_whole(report)
