"""Two replicas answer as one engine, each runs whole groups, and one report tells of both."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import sglang as sgl

import programs
from engines import CONTEXT_LENGTH, flush, wait_until_whole
from processes import children_named
from programs import arguments
from prompts import distinct_tokens, mixed_batch
from sglang_batchllm.client.get_report import get_report
from sglang_batchllm.edge import replicas
from sglang_batchllm.edge.engine_backend import EngineBackend
from sglang_batchllm.edge.levelling import Levelling
from sglang_batchllm.planning import Costs
from sglang_batchllm.wire.lines import Reply, read_answers, request_line
from sglang_batchllm.wire.request_ids import RequestId, new_batch_id
from test_sharing import assert_pool_is_whole, computed_tokens, output_ids

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def sampling(index: int) -> dict[str, Any]:
    return GREEDY | {"max_new_tokens": 1 + index % 7}


def replica_of(result: dict[str, Any]) -> int:
    return result["meta_info"]["dp_rank"]


@pytest.fixture(scope="module", autouse=True)
def quiet_afterwards(replicated_engine: Any) -> Iterator[None]:
    """The process before the replicas never sleeps, and the engine ends with the session."""
    yield
    (controller,) = children_named("data_parallel_controller")
    controller.suspend()


def test_a_caller_may_choose_the_replica(replicated_engine):
    """First, since SGLang 0.5.23 checks the choice by the engine that was made last."""
    prompts = mixed_batch(10, seed=2)
    for replica in (0, 1):
        results = replicated_engine.generate(
            input_ids=prompts, sampling_params=sampling(2), routed_dp_rank=replica
        )
        assert {*map(replica_of, results)} == {replica}


def test_a_list_is_answered_in_order_and_computed_once(replicated_engine, stock_engine):
    prompts = mixed_batch(120)
    params = [sampling(index) for index in range(len(prompts))]
    flush(replicated_engine)
    results = replicated_engine.generate(input_ids=prompts, sampling_params=params)
    expected = stock_engine.generate(input_ids=prompts, sampling_params=params)
    assert output_ids(results) == output_ids(expected)
    report = wait_until_whole(replicated_engine)
    last = report["batches"][-1]
    assert computed_tokens(results) == last["computed_tokens"]
    assert last["distinct_tokens"] == distinct_tokens(prompts)
    assert last["computed_tokens"] == last["distinct_tokens"] + last["repeated_tokens"]
    assert last["finished"] == last["requests"] == len(prompts)
    assert last["prompt_tokens"] == sum(map(len, prompts))
    assert last["output_tokens"] == sum(param["max_new_tokens"] for param in params)
    assert report["replicas"] == 2
    assert_pool_is_whole(report)

    ran = Counter(map(replica_of, results))
    assert [one["requests"] for one in last["replicas"]] == [ran[0], ran[1]]
    for number, one in enumerate(last["replicas"]):
        mine = [
            prompt for prompt, r in zip(prompts, results, strict=True) if replica_of(r) == number
        ]
        assert one["replica"] == number
        assert one["computed_tokens"] == one["distinct_tokens"] == distinct_tokens(mine)
    assert not replicated_engine.tokenizer_manager.rid_to_state


def test_a_group_that_is_most_of_a_list_is_split_and_the_report_says_what_that_cost(
    replicated_engine, monkeypatch
):
    """Where decoding takes longer than the prefix that is computed twice."""
    costs = Costs(prefill_token=1e-6, pair=0, decode_token=1, kv_token=0)
    cut = replicas.partition
    monkeypatch.setattr(
        replicas, "partition", lambda plan, shards, outputs: cut(plan, shards, outputs, costs)
    )
    shared = list(range(10, 90))
    prompts = [[*shared, token] for token in range(100, 120)]
    flush(replicated_engine)
    results = replicated_engine.generate(input_ids=prompts, sampling_params=sampling(3))
    assert Counter(map(replica_of, results)) == {0: 10, 1: 10}
    last = wait_until_whole(replicated_engine)["batches"][-1]
    assert last["distinct_tokens"] == len(shared) + len(prompts)
    assert last["repeated_tokens"] == len(shared)
    assert last["computed_tokens"] == computed_tokens(results) == 2 * len(shared) + len(prompts)


def test_lists_of_one_take_turns(replicated_engine):
    results = [
        replicated_engine.generate(input_ids=[[7, 8, 9]], sampling_params=sampling(0))[0]
        for _ in range(4)
    ]
    assert len({tuple(result["output_ids"]) for result in results}) == 1
    assert get_report(replicated_engine)["batches"][-1]["requests"] == 1


def test_single_requests_are_answered(replicated_engine, stock_engine):
    prompts = mixed_batch(20, seed=4)

    async def ask() -> list[dict[str, Any]]:
        calls = [
            replicated_engine.async_generate(input_ids=prompt, sampling_params=sampling(3))
            for prompt in prompts
        ]
        return await asyncio.gather(*calls)

    results = replicated_engine.loop.run_until_complete(ask())
    expected = stock_engine.generate(input_ids=prompts, sampling_params=sampling(3))
    assert output_ids(results) == output_ids(expected)
    assert len({*map(replica_of, results)}) == 2
    wait_until_whole(replicated_engine)


def test_aborts_leave_the_others_unchanged(replicated_engine, stock_engine):
    prompts = mixed_batch(60, seed=3)
    rids = [f"replicas-{index:03d}" for index in range(len(prompts))]
    doomed = set(rids[::3])
    params = [GREEDY | {"max_new_tokens": 300 if rid in doomed else 12} for rid in rids]

    async def run() -> list[dict[str, Any]]:
        task = asyncio.ensure_future(
            replicated_engine.async_generate(input_ids=prompts, sampling_params=params, rid=rids)
        )
        await asyncio.sleep(0.3)
        for rid in doomed:
            replicated_engine.tokenizer_manager.abort_request(rid)
        return await task

    results = replicated_engine.loop.run_until_complete(run())
    short = [GREEDY | {"max_new_tokens": 12}] * len(prompts)
    expected = stock_engine.generate(input_ids=prompts, sampling_params=short)
    aborted = [r["meta_info"]["finish_reason"]["type"] == "abort" for r in results]
    for rid, result, reference in zip(rids, results, expected, strict=True):
        if rid not in doomed:
            assert result["output_ids"] == reference["output_ids"]
    last = wait_until_whole(replicated_engine)["batches"][-1]
    assert last["aborted"] == sum(aborted)
    assert all(one["aborted"] for one in last["replicas"])
    assert last["finished"] == len(prompts) - sum(aborted)


def test_a_request_that_is_refused_ends_its_list(replicated_engine):
    prompts = [*mixed_batch(20, seed=5), [7] * (CONTEXT_LENGTH + 1)]
    with pytest.raises(ValueError, match="context length"):
        replicated_engine.generate(input_ids=prompts, sampling_params=sampling(3))
    assert not replicated_engine.tokenizer_manager.rid_to_state
    results = replicated_engine.generate(input_ids=prompts[:-1], sampling_params=sampling(3))
    assert len(results) == len(prompts) - 1


def test_requests_of_a_hand_over_that_fail_do_so_alone(replicated_engine, stock_engine):
    """Refused in the front process, refused by a replica, aborted while it runs."""
    prompts = mixed_batch(60, seed=7)
    bodies: list[dict[str, Any]] = [
        {"input_ids": prompt, "sampling_params": sampling(index)}
        for index, prompt in enumerate(prompts)
    ]
    long = {"input_ids": [7] * (CONTEXT_LENGTH + 1), "sampling_params": GREEDY}
    params = {
        5: {"temperature": -1},
        23: {"no_such": 1},
        31: {"json_schema": "{"},
        44: {"max_new_tokens": 1900, **GREEDY},
    }
    for index, bad in params.items():
        bodies[index] = {"input_ids": prompts[index], "sampling_params": bad}
    bodies[11] = long
    batch = new_batch_id()
    lines = [request_line(0, orjson.dumps(body), more=False) for body in bodies]
    flush(replicated_engine)
    backend = EngineBackend(replicated_engine, "chatml")
    replies: dict[int, Reply] = {}
    for answer in read_answers(backend.hand_over(batch, lines)):
        if answer is not None:
            replies[answer[0]] = answer[1]
        if len(replies) == len(bodies) - 1:
            rid = str(RequestId("once", batch, 0, 44))
            replicated_engine.loop.call_soon_threadsafe(
                replicated_engine.tokenizer_manager.abort_request, rid
            )
    said = {
        index: reply.content["error"]["message"]
        for index, reply in replies.items()
        if reply.status_code != 200
    }
    assert said.keys() == {5, 11, 23, 31}
    assert "temperature" in said[5] and "context length" in said[11]
    assert "no_such" in said[23] and "grammar" in said[31]
    assert replies.pop(44).content["meta_info"]["finish_reason"]["type"] == "abort"
    expected = stock_engine.generate(
        input_ids=prompts, sampling_params=[sampling(index) for index in range(len(prompts))]
    )
    for index, reply in replies.items():
        if index not in said:
            assert reply.content["text"] == expected[index]["text"]
    last = wait_until_whole(replicated_engine)["batches"][-1]
    assert last["finished"] == len(prompts) - len(said) - 1
    assert not replicated_engine.tokenizer_manager.rid_to_state


def test_samples_and_logprobs_of_prompts(replicated_engine, stock_engine):
    prompts = mixed_batch(24, seed=6)
    flush(replicated_engine)
    several = GREEDY | {"max_new_tokens": 3, "n": 2}
    results = replicated_engine.generate(input_ids=prompts, sampling_params=several)
    expected = stock_engine.generate(input_ids=prompts, sampling_params=several)
    assert output_ids(results) == output_ids(expected)
    last = wait_until_whole(replicated_engine)["batches"][-1]
    assert last["requests"] == 2 * len(prompts)
    assert last["computed_tokens"] == last["distinct_tokens"] + last["repeated_tokens"]

    flush(replicated_engine)
    options = {"return_logprob": True, "logprob_start_len": 0}
    ours = replicated_engine.generate(input_ids=prompts, sampling_params=sampling(0), **options)
    stock = stock_engine.generate(input_ids=prompts, sampling_params=sampling(0), **options)
    for one, other in zip(ours, stock, strict=True):
        mine, theirs = (r["meta_info"]["input_token_logprobs"][1:] for r in (one, other))
        assert [row[1] for row in mine] == [row[1] for row in theirs]
        assert np.allclose([row[0] for row in mine], [row[0] for row in theirs], atol=1e-4)
    last = wait_until_whole(replicated_engine)["batches"][-1]
    assert last["computed_tokens"] == last["distinct_tokens"] + last["repeated_tokens"]


def test_samples_of_one_prompt_stay_together(replicated_engine, stock_engine):
    prompts = [[first, *range(40, 90)] for first in range(4, 10)]
    flush(replicated_engine)
    several = GREEDY | {"max_new_tokens": 3, "n": 4}

    async def ask() -> list[list[dict[str, Any]]]:
        calls = [
            replicated_engine.async_generate(input_ids=prompt, sampling_params=several)
            for prompt in prompts
        ]
        return await asyncio.gather(*calls)

    answers = replicated_engine.loop.run_until_complete(ask())
    ran = set()
    for prompt, samples in zip(prompts, answers, strict=True):
        (replica,) = {sample["meta_info"]["dp_rank"] for sample in samples}
        ran.add(replica)
        assert computed_tokens(samples) == len(prompt) + len(samples) - 1
    assert ran == {0, 1}
    expected = stock_engine.generate(
        input_ids=prompts, sampling_params=GREEDY | {"max_new_tokens": 3}
    )
    assert [output_ids(samples)[0] for samples in answers] == output_ids(expected)


def test_programs_go_on_where_they_began(replicated_engine, stock_engine):
    ours, stock = (EngineBackend(one, "chatml") for one in (replicated_engine, stock_engine))
    flush(replicated_engine)
    judge = sgl.function(programs.judge)
    states = judge.run_batch(arguments(24), backend=ours, **GREEDY)
    expected = judge.run_batch(arguments(24), backend=stock, **GREEDY)
    assert [state.text() for state in states] == [state.text() for state in expected]
    ran = set()
    for state in states:
        first, second = state.get_meta_info("grade"), state.get_meta_info("why")
        assert second["dp_rank"] == first["dp_rank"]
        assert second["cached_tokens"] >= first["prompt_tokens"]
        ran.add(first["dp_rank"])
    assert ran == {0, 1}
    wait_until_whole(replicated_engine)
    assert not replicated_engine.tokenizer_manager.replicas._homes


# Levelling


@pytest.fixture
def levelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of short lists are held back, too."""
    monkeypatch.setattr(replicas, "HOLD_FROM", 20)
    monkeypatch.setattr(replicas, "LEAST_PIECE", 5)


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each piece, the replica that had it and the one that got it."""
    moves: list[tuple[int, int]] = []
    hand_out = Levelling._hand_out

    def note(self: Levelling, held: Any, replica: int) -> None:
        moves.append((held.message.shard.replica, replica))
        hand_out(self, held, replica)

    monkeypatch.setattr(Levelling, "_hand_out", note)
    return moves


def held_back(engine: Any) -> int:
    return sum(map(len, engine.tokenizer_manager._levelling._held))


@pytest.mark.usefixtures("levelled")
def test_what_is_held_back_is_computed_once_too(replicated_engine, stock_engine, handed_out):
    prompts = mixed_batch(240, seed=8)
    params = [sampling(index) for index in range(len(prompts))]
    flush(replicated_engine)
    results = replicated_engine.generate(input_ids=prompts, sampling_params=params)
    expected = stock_engine.generate(input_ids=prompts, sampling_params=params)
    assert output_ids(results) == output_ids(expected)
    assert len(handed_out) >= 4
    report = wait_until_whole(replicated_engine)
    last = report["batches"][-1]
    assert last["finished"] == len(prompts)
    assert last["distinct_tokens"] == distinct_tokens(prompts)
    assert last["computed_tokens"] == last["distinct_tokens"] + last["repeated_tokens"]
    assert [one["replica"] for one in last["replicas"]] == [0, 1]
    assert not held_back(replicated_engine)
    assert report["running"] == []


@pytest.mark.usefixtures("levelled")
def test_a_replica_that_stands_still_leaves_its_groups_to_the_other(replicated_engine, handed_out):
    prompts = mixed_batch(240, seed=9)
    flush(replicated_engine)
    (scheduler,) = children_named("scheduler_DP0")
    scheduler.suspend()
    timer = threading.Timer(6, scheduler.resume)
    timer.start()
    try:
        results = replicated_engine.generate(input_ids=prompts, sampling_params=sampling(2))
    finally:
        scheduler.resume()
        timer.cancel()
    assert (0, 1) in handed_out
    ran = Counter(map(replica_of, results))
    print(f"\n{ran}, {handed_out}")
    assert ran[1] > 0.6 * len(prompts)
    last = wait_until_whole(replicated_engine)["batches"][-1]
    assert last["finished"] == len(prompts)
    assert last["computed_tokens"] == last["distinct_tokens"] + last["repeated_tokens"]


@pytest.mark.usefixtures("levelled")
def test_aborts_reach_what_is_held_back(replicated_engine):
    prompts = mixed_batch(120, seed=10)
    rids = [f"held-{index:03d}" for index in range(len(prompts))]
    held: list[int] = []

    async def run() -> list[dict[str, Any]]:
        task = asyncio.ensure_future(
            replicated_engine.async_generate(
                input_ids=prompts, sampling_params=GREEDY | {"max_new_tokens": 400}, rid=rids
            )
        )
        while not held_back(replicated_engine):
            await asyncio.sleep(0.01)
        held.append(held_back(replicated_engine))
        for rid in rids:
            replicated_engine.tokenizer_manager.abort_request(rid)
        return await task

    results = replicated_engine.loop.run_until_complete(run())
    assert held[0] > 2
    assert {r["meta_info"]["finish_reason"]["type"] for r in results} == {"abort"}
    wait_until_whole(replicated_engine)
    assert not held_back(replicated_engine)
    assert not replicated_engine.tokenizer_manager.rid_to_state


@pytest.mark.usefixtures("levelled")
def test_programs_that_were_held_back_go_on_where_they_began(replicated_engine, handed_out):
    flush(replicated_engine)

    def judge(s: Any, number: int) -> None:
        s += f"{chr(65 + number % 25)} is what row {number} begins with. Grade: "
        s += sgl.gen("grade", max_tokens=3)
        s += " Why " + s["grade"] + "? " + sgl.gen("why", max_tokens=2)

    rows = [{"number": number} for number in range(120)]
    states = sgl.function(judge).run_batch(
        rows, backend=EngineBackend(replicated_engine, "chatml"), **GREEDY
    )
    assert handed_out
    for state in states:
        first, second = state.get_meta_info("grade"), state.get_meta_info("why")
        assert second["dp_rank"] == first["dp_rank"]
    wait_until_whole(replicated_engine)
    manager = replicated_engine.tokenizer_manager
    assert not manager.replicas._homes
    assert not manager.replicas._turns
