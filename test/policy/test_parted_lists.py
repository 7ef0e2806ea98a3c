"""Lists in parts, over a cache that knows tokens: computed once, nothing left behind."""

import random
from typing import get_args

from hypothesis import given, settings

from engine_model import EngineModel, Policy
from kv_model import Request, make_request
from sglang_batchllm.policy.batch import member_of
from sglang_batchllm.policy.parts import Part
from sglang_batchllm.policy.step import Mixes
from test_steps import assert_whole, computed, prompt_lists, run_disturbed, seeds
from token_pool import TokenPool

LAST = 7
"""The last token of all prompts, so that none is the beginning of another."""


def step(engine: EngineModel) -> None:
    """Also where nothing can run until more has come, for which the model raises."""
    engine._stuck = False
    engine.step()


def in_parts(
    engine: EngineModel, requests: list[Request], rng: random.Random, steps: int = 3
) -> None:
    """Hand a list over in parts, with up to so many steps between them."""
    left = [*requests]
    while left:
        size = rng.randint(1, len(left))
        part, left = left[:size], left[size:]
        engine.submit_list(part, part=Part("list", last=not left))
        for _ in range(rng.randint(0, steps)):
            step(engine)


def engine_of(
    prompts: list[list[int]], rng: random.Random, capacity: int
) -> tuple[EngineModel, list[Request]]:
    policy = Policy(rng.randint(1, 40), rng.choice(get_args(Mixes)), max_running=8)
    engine = EngineModel(capacity, policy, pool=TokenPool)
    return engine, [
        make_request(str(i), [*prompt, LAST], rng.choice([1, 1, 4]))
        for i, prompt in enumerate(prompts)
    ]


@settings(max_examples=300, deadline=None)
@given(prompt_lists, seeds)
def test_everything_is_computed_once_and_nothing_is_held(prompts, seed):
    rng = random.Random(seed)
    engine, requests = engine_of(prompts, rng, 10**6)
    in_parts(engine, requests, rng)
    engine.run()
    report = engine.policy.report()
    (batch,) = report["batches"]
    assert computed(engine) == batch["distinct_tokens"] == batch["computed_tokens"]
    assert batch["finished"] == batch["requests"] == len(prompts)
    assert batch["prompt_tokens"] == sum(map(len, prompts)) + len(prompts)
    assert batch["output_tokens"] == report["total"]["output_tokens"]
    assert batch["groups"] == report["total"]["groups"]
    assert_whole(engine)


@settings(max_examples=300, deadline=None)
@given(prompt_lists, seeds)
def test_aborts_retractions_and_little_memory_leak_nothing(prompts, seed):
    rng = random.Random(seed)
    engine, requests = engine_of(prompts, rng, rng.choice([30, 60, 10**6]))
    cut = rng.randint(1, len(requests))
    in_parts_of = requests[:cut]
    engine.submit_list(in_parts_of, part=Part("list", last=False))
    for _ in range(rng.randint(0, 6)):
        step(engine)
        if rng.random() < 0.5:
            alive = [request for request in in_parts_of if request.end is None]
            if alive:
                engine.abort(rng.choice(alive))
        if engine.running and rng.random() < 0.3:
            engine.retract(rng.choice(engine.running))
    engine.submit_list(requests[cut:], part=Part("list", last=True))
    run_disturbed(engine, requests, rng)
    assert all(request.end is not None for request in requests)
    assert engine.policy.report()["total"]["requests"] == len(requests)
    step(engine)
    assert_whole(engine)


def test_the_first_part_runs_before_the_list_is_complete():
    engine = EngineModel(10**6, Policy(), pool=TokenPool)
    first = [make_request(str(i), [1, 2, i], 4) for i in range(4)]
    engine.submit_list(first, part=Part("list", last=False))
    engine.step()
    assert computed(engine) == 2 + 1  # of the leader; the others follow it
    engine.step()
    assert computed(engine) == 2 + 4
    members = [member_of(request) for request in first]
    assert all(member is not None and member.slot >= 0 for member in members)
    engine.submit_list([make_request("last", [1, 2, 9], 4)], part=Part("list", last=True))
    engine.step()
    assert computed(engine) == 2 + 4 + 1
    assert engine.policy.report()["running"][0]["requests"] == 5


def test_what_is_left_of_a_part_shares_its_step_with_what_has_come():
    """The list is not complete, and the last of its first part does not fill the second step."""
    engine = EngineModel(10**6, Policy(chunk=40), pool=TokenPool)
    parts = [[make_request(f"{i} {j}", [5 * i + j] * 10, 4) for j in range(5)] for i in range(2)]
    engine.submit_list(parts[0], part=Part("list", last=False))
    engine.step()
    engine.submit_list(parts[1], part=Part("list", last=False))
    engine.step()
    assert [computed(engine), len(engine.running)] == [80, 4]
    engine.submit_list([], part=Part("list", last=True))
    engine.run()
    assert computed(engine) == 100
    assert_whole(engine)


def test_a_first_part_that_takes_much_of_the_memory_waits_for_the_list():
    engine = EngineModel(100, Policy(), pool=TokenPool)
    engine.submit_list([make_request(str(i), [i] * 20, 4) for i in range(2)], part=Part("a", False))
    engine.step()
    assert computed(engine) == 0
    engine.submit_list([], part=Part("a", last=True))
    engine.run()
    assert computed(engine) == 40
    assert_whole(engine)


def test_running_requests_say_that_their_group_is_another():
    shared = list(range(1, 201))
    engine = EngineModel(10**6, Policy(), pool=TokenPool)
    first = [make_request(str(i), [*shared, i], 9) for i in range(3)]
    engine.submit_list(first, part=Part("list", last=False))
    for _ in range(3):
        engine.step()
    before = {tuple(engine.policy.shared_path(request, 200)) for request in first}
    engine.submit_list([make_request("x", [*shared, 8], 9)], part=Part("list", last=True))
    decision = engine.policy.choose(engine._view())
    assert {id(request) for request in decision.regrouped} == {id(request) for request in first}
    after = {tuple(engine.policy.shared_path(request, 200)) for request in first}
    assert len(before) == len(after) == 1 and () not in before | after
    assert before != after
