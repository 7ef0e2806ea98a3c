"""Logprobs of prompts: those of stock SGLang, with every shared token computed once."""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import (
    SERVER_PAGE_SIZE,
    VOCAB_SIZE,
    Server,
    flush,
    wait_until_whole,
)
from prompts import distinct_tokens
from steps import read_steps

IDS = [5, 17, 99]


def scored_batch(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of two levels of shared prefixes, some equal, and some the beginnings of others."""
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]

    documents = [tokens(rng.randrange(20, 70)) for _ in range(6)]
    questions = [[*rng.choice(documents), *tokens(rng.randrange(3, 20))] for _ in range(30)]
    prompts = [[*rng.choice(questions), *tokens(rng.randrange(1, 8))] for _ in range(count - 24)]
    prompts += rng.sample(prompts, 8) + rng.sample(questions, 8) + documents[:4]
    prompts += [tokens(rng.randrange(1, 40)) for _ in range(4)]
    rng.shuffle(prompts)
    return prompts


def asks(prompts: list[list[int]], with_ids: bool) -> dict[str, list[Any]]:
    """Logprobs from anywhere in the prompt on, with and without the likeliest tokens; and either of
    ids too or not of all requests. (Stock SGLang 0.5.17 breaks where both are in one batch.)"""
    rng = random.Random(0)
    starts = [rng.choice([0, 0, -1, rng.randrange(len(p)), len(p) - 1, len(p)]) for p in prompts]
    wanted: dict[str, list[Any]] = {
        "return_logprob": [with_ids or rng.random() < 0.7 for _ in prompts],
        "logprob_start_len": starts,
        "top_logprobs_num": [rng.choice([0, 2, 3]) for _ in prompts],
    }
    if with_ids:
        wanted["token_ids_logprob"] = [rng.choice([[], IDS, IDS[1:]]) for _ in prompts]
    return wanted


def same(ours: Any, stock: Any) -> bool:
    """Logprobs to 1e-5, and all else exactly."""
    if isinstance(stock, (list, tuple)):
        return len(ours) == len(stock) and all(map(same, ours, stock))
    if isinstance(stock, float):
        return math.isclose(ours, stock, abs_tol=1e-5)
    return ours == stock


def assert_same_logprobs(ours: list[dict], stock: list[dict]) -> None:
    for index, (mine, theirs) in enumerate(zip(ours, stock, strict=True)):
        assert mine["output_ids"] == theirs["output_ids"], index
        names = {name for name in theirs["meta_info"] if "logprobs" in name}
        assert names == {name for name in mine["meta_info"] if "logprobs" in name}
        for name in names:
            assert same(mine["meta_info"][name], theirs["meta_info"][name]), (index, name)


def computed(results: list[dict]) -> int:
    infos = [result["meta_info"] for result in results]
    return sum(info["prompt_tokens"] - info["cached_tokens"] for info in infos)


def run(engine: Any, prompts: list[list[int]], outputs: int = 3, **options: Any) -> list[dict]:
    flush(engine)
    sampling = {"temperature": 0, "max_new_tokens": outputs, "ignore_eos": True}
    return engine.generate(input_ids=prompts, sampling_params=sampling, **options)


@pytest.fixture(scope="module")
def stock_answers(stock_engine: Any) -> Callable[[bool], list[dict]]:
    """Of the test below."""
    prompts = scored_batch(300)
    return functools.cache(lambda with_ids: run(stock_engine, prompts, **asks(prompts, with_ids)))


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("which", ["engine", "scarce_engine", "mixing_engine"])
def test_logprobs_are_those_of_stock(
    which: str, with_ids: bool, request: pytest.FixtureRequest, stock_answers: Callable
) -> None:
    """Ample and scarce KV, chunks that cut shared prefixes anywhere, requests that ask otherwise
    than those whose tokens they share, or nothing."""
    engine = request.getfixturevalue(which)
    prompts = scored_batch(300)
    wanted = asks(prompts, with_ids)
    ours = run(engine, prompts, **wanted)
    report = wait_until_whole(engine)
    assert_same_logprobs(ours, stock_answers(with_ids))
    assert report["logprob_bytes"]["now"] == 0 < report["logprob_bytes"]["peak"]
    if which != "scarce_engine":  # where prefixes are given up, and computed again
        assert computed(ours) == distinct_tokens(prompts)
        assert report["batches"][-1]["rescored_tokens"] == 0


@pytest.mark.parametrize("outputs", [0, 1])
def test_whole_prompts_share_as_without_logprobs(
    outputs: int, engine: Any, stock_engine: Any
) -> None:
    """As lm-evaluation-harness asks."""
    prompts = scored_batch(120, seed=1)
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    ours, stock = (run(one, prompts, outputs, **options) for one in (engine, stock_engine))
    assert_same_logprobs(ours, stock)
    assert computed(ours) == distinct_tokens(prompts)
    assert computed(stock) == sum(map(len, prompts))
    rows = [row for one in ours for row in one["meta_info"]["input_top_logprobs"] if row]
    assert len({id(row) for row in rows}) < len(rows) / 2, "each was made for every request"


def test_pages_of_several_tokens(server: Server, stock_engine: Any) -> None:
    """Of a page that is not whole nobody finds anything."""
    prompts = scored_batch(100, seed=2)
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    flush(server)
    body = {"input_ids": prompts, "sampling_params": sampling, **options}
    ours = server.post("/generate", body).json()
    assert_same_logprobs(ours, run(stock_engine, prompts, 1, **options))
    assert computed(ours) == distinct_tokens(prompts, SERVER_PAGE_SIZE)


def test_requests_that_gather_share(engine: Any, stock_engine: Any) -> None:
    prompts = scored_batch(80, seed=3)
    options = {"return_logprob": True, "logprob_start_len": 0}
    stock = run(stock_engine, prompts, 1, **options)
    flush(engine)
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}

    async def all_at_once() -> list[dict]:
        return await asyncio.gather(
            *[
                engine.async_generate(input_ids=prompt, sampling_params=sampling, **options)
                for prompt in prompts
            ]
        )

    ours = engine.loop.run_until_complete(all_at_once())
    assert_same_logprobs(ours, stock)
    assert computed(ours) < computed(stock) / 2
    assert wait_until_whole(engine)["logprob_bytes"]["now"] == 0


@pytest.mark.parametrize("which", ["engine", "scarce_engine"])
def test_aborts_harm_nobody(which: str, request: pytest.FixtureRequest, stock_engine: Any) -> None:
    """Every third request is aborted while all run, in ample memory and in little."""
    engine = request.getfixturevalue(which)
    prompts = scored_batch(90, seed=4)
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    stock = run(stock_engine, prompts, 12, **options)
    flush(engine)
    rids = [f"{which}-scored-{index:03d}" for index in range(len(prompts))]
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}

    async def disturbed() -> list[dict]:
        task = asyncio.ensure_future(
            engine.async_generate(input_ids=prompts, sampling_params=sampling, rid=rids, **options)
        )
        await asyncio.sleep(0.1)
        for rid in rids[::3]:
            engine.tokenizer_manager.abort_request(rid)
        return await task

    ours = engine.loop.run_until_complete(disturbed())
    report = wait_until_whole(engine)
    assert report["logprob_bytes"]["now"] == 0
    whole = [r["meta_info"]["finish_reason"]["type"] != "abort" for r in ours]
    assert len(prompts) * 2 // 3 <= sum(whole) < len(prompts)
    pairs = [pair for pair, good in zip(zip(ours, stock, strict=True), whole, strict=True) if good]
    assert_same_logprobs(*map(list, zip(*pairs, strict=True)))


def test_where_memory_is_short_requests_score_as_in_stock(
    forgetful_engine: Any, stock_engine: Any
) -> None:
    prompts = scored_batch(60, seed=5)
    options = {"return_logprob": True, "logprob_start_len": 0}
    ours = run(forgetful_engine, prompts, 2, **options)
    assert_same_logprobs(ours, run(stock_engine, prompts, 2, **options))
    report = wait_until_whole(forgetful_engine)["batches"][-1]
    assert computed(ours) == sum(map(len, prompts))
    assert report["rescored_tokens"] == computed(ours) - distinct_tokens(prompts)


def test_requests_that_only_score_run_in_full_prefill_steps(
    mixing_engine: Any, steps_file: Path
) -> None:
    flush(mixing_engine)
    before = len(read_steps(steps_file))
    prompts = scored_batch(200, seed=6)
    run(mixing_engine, prompts, 1, return_logprob=True, logprob_start_len=0)
    steps = read_steps(steps_file)[before:]
    prefills = [step.prefill_tokens for step in steps if step.prefill_tokens]
    assert sum(prefills) == distinct_tokens(prompts)
    assert len(prefills) < 1.1 * sum(prefills) / max(prefills)
    assert len(steps) - len(prefills) <= 1  # launched before the last answers were known
