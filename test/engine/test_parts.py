"""Long lists run in parts while they are prepared, and come out as in one piece."""

import asyncio
import random
import time
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from engines import API_KEY, CONTEXT_LENGTH, SERVER_PAGE_SIZE, flush, wait_until_whole
from prompts import distinct_tokens, mixed_batch
from sglang_batchllm.client.get_report import get_report
from sglang_batchllm.edge import lists, parting
from sglang_batchllm.edge.list_states import seam
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


def test_the_first_step_runs_while_parts_are_sent(engine, monkeypatch):
    """Some are answered before the last is sent."""
    send = lists.ListIntake.send_list
    answered: list[int] = []

    async def wait_and_send(self: Any, tokenized: list[Any]) -> None:
        known = set(self.rid_to_state)
        await send(self, tokenized)
        await asyncio.sleep(0.2)
        answered.append(len(known.difference(self.rid_to_state)))

    monkeypatch.setattr(lists.ListIntake, "send_list", wait_and_send)
    prompts = without_beginnings(mixed_batch(60, seed=4))
    results = engine.generate(input_ids=prompts, sampling_params=sampling(0))
    assert sum(answered) > PART
    assert len(results) == len(prompts)
    assert all(result["meta_info"]["completion_tokens"] == 1 for result in results)
    wait_until_whole(engine)
    assert not engine.tokenizer_manager.rid_to_state


def test_a_request_that_is_refused_ends_its_list(engine, parts):
    prompts = [*without_beginnings(mixed_batch(100, seed=5)), [7] * (CONTEXT_LENGTH + 1)]
    long = sampling(0) | {"max_new_tokens": 300}
    with pytest.raises(ValueError, match="context length"):
        engine.generate(input_ids=prompts, sampling_params=long)
    assert len(parts) > 2
    report = wait_until_whole(engine)
    assert report["batches"][-1]["aborted"] > 0
    assert not engine.tokenizer_manager.rid_to_state
    results = engine.generate(input_ids=prompts[:-1], sampling_params=sampling(0))
    assert len(results) == len(prompts) - 1


def test_an_abort_while_parts_are_sent(engine, monkeypatch):
    prompts = without_beginnings(mixed_batch(100, seed=6))
    rids = [f"parted-{index:03d}" for index in range(len(prompts))]
    send = lists.ListIntake.send_list
    sent: list[str] = []

    async def send_and_abort(self: Any, tokenized: list[Any]) -> None:
        await send(self, tokenized)
        await asyncio.sleep(0.05)
        sent.extend(request.rid for request in tokenized)
        if len(sent) == 3 * PART:
            self.abort_request(sent[PART])

    monkeypatch.setattr(lists.ListIntake, "send_list", send_and_abort)
    long = sampling(0) | {"max_new_tokens": 100}
    results = engine.generate(input_ids=prompts, sampling_params=long, rid=rids)
    reasons = [result["meta_info"]["finish_reason"]["type"] for result in results]
    assert reasons.index("abort") == rids.index(sent[PART])
    assert reasons.count("length") == len(prompts) - 1
    wait_until_whole(engine)
    assert not engine.tokenizer_manager.rid_to_state


def test_states_are_made_as_a_list_is_sent(engine, monkeypatch):
    """Until then their ids are taken."""
    send = lists.ListIntake.send_list
    still_to_make: list[int] = []
    refused: list[str] = []

    async def look_and_send(self: Any, tokenized: list[Any]) -> None:
        states = self.rid_to_state
        unmade = [rid for rid in rids if rid in states and states[rid].obj.rid != rid]
        still_to_make.append(len(unmade))
        if len(still_to_make) == 2:
            again = GenerateReqInput(input_ids=[1, 2], rid=unmade[-1], sampling_params=sampling(0))
            try:
                await self.generate_request(again).__anext__()
            except ValueError as error:
                refused.append(str(error))
        await send(self, tokenized)

    monkeypatch.setattr(lists.ListIntake, "send_list", look_and_send)
    prompts = without_beginnings(mixed_batch(100, seed=8))
    rids = [f"unmade-{index:03d}" for index in range(len(prompts))]
    results = engine.generate(input_ids=prompts, sampling_params=sampling(0), rid=rids)
    assert [result["meta_info"]["id"] for result in results] == rids
    assert still_to_make[0] > len(prompts) // 2
    assert still_to_make == sorted(still_to_make, reverse=True)
    assert still_to_make[-1] == 0
    assert len(refused) == 1
    assert "Duplicate request ID" in refused[0]
    with pytest.raises(ValueError, match="Duplicate request ID"):
        engine.generate(input_ids=prompts, sampling_params=sampling(0), rid=rids[:-1] + rids[:1])
    wait_until_whole(engine)
    assert not engine.tokenizer_manager.rid_to_state


def test_an_abort_before_the_state_is_made_is_noted_in_it(engine, monkeypatch):
    send = lists.ListIntake.send_list
    noted: list[bool] = []

    async def abort_and_send(self: Any, tokenized: list[Any]) -> None:
        state = self.rid_to_state[rids[-1]]
        whole = state.obj
        if whole.rid != rids[-1]:
            before = getattr(state, seam.NOTED[0])
            self.abort_request(rids[-1])
            self.make_states([whole[len(rids) - 1]])
            noted.append(
                not before and getattr(state, seam.NOTED[0]) and state.obj is whole[len(rids) - 1]
            )
            setattr(state, seam.NOTED[0], False)
        await send(self, tokenized)

    monkeypatch.setattr(lists.ListIntake, "send_list", abort_and_send)
    prompts = without_beginnings(mixed_batch(60, seed=9))
    rids = [f"noted-{index:03d}" for index in range(len(prompts))]
    results = engine.generate(input_ids=prompts, sampling_params=sampling(0), rid=rids)
    assert noted == [True]
    assert len(results) == len(prompts)
    wait_until_whole(engine)
    assert not engine.tokenizer_manager.rid_to_state


def test_texts_in_parts(engine, parts):
    texts = [f"Sort this into one of five: {'x' * 40} item {index}" for index in range(80)]
    results = engine.generate(texts, sampling_params=sampling(3))
    assert len(parts) > 3
    alone = [engine.generate(text, sampling_params=sampling(3))["text"] for text in texts[::16]]
    assert [result["text"] for result in results[::16]] == alone


def test_grammars_and_streams_in_parts(engine, parts):
    prompts = without_beginnings(mixed_batch(100, seed=7))
    constrained = {"temperature": 0, "max_new_tokens": 60, "json_schema": '{"type": "boolean"}'}
    params = [constrained if index % 3 else sampling(index) for index in range(len(prompts))]
    texts: dict[int, str] = {}
    for chunk in engine.generate(input_ids=prompts, sampling_params=params, stream=True):
        texts[chunk["index"]] = chunk["text"]
    assert len(parts) > 3
    assert len(texts) == len(prompts)
    assert {texts[index] for index in texts if index % 3} <= {"true", "false"}
    report = wait_until_whole(engine)["batches"][-1]
    assert report["finished"] == len(prompts)
    assert not engine.tokenizer_manager.rid_to_state


def test_a_long_list_over_http(server):
    """With the sizes that users have; its parts are those of a process of its own."""
    shared = list(range(10, 18))
    prompts = [[*shared, *([20 + index % 200, 20 + index // 200] * 5)] for index in range(2000)]
    flush(server)
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": sampling(0)})
    results = answers.json()
    assert len(results) == len(prompts)
    alone = server.post("/generate", {"input_ids": prompts[77], "sampling_params": sampling(0)})
    assert results[77]["output_ids"] == alone.json()["output_ids"]
    report = wait_until_whole(server.url, API_KEY)["batches"][-1]
    assert report["finished"] == report["requests"] == len(prompts)
    assert report["computed_tokens"] == distinct_tokens(prompts, SERVER_PAGE_SIZE)
