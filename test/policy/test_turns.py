"""Who waits for whom, and for how long at most."""

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from engine_model import EngineModel, Policy
from kv_model import Request, make_request
from sglang_batchllm.policy.batch import member_of
from sglang_batchllm.policy.core import BatchPolicy
from sglang_batchllm.policy.requests import Turn
from sglang_batchllm.policy.step import Arrival, Limits, View

POOL = 2000
OUTPUT = 20


def requests_of(count: int, tokens: int, first: int = 0) -> list[Request]:
    """Prompts that share nothing."""
    return [make_request(f"{tokens}-{i}", [first + i] * tokens, OUTPUT) for i in range(count)]


def steps_until_all_have_run(
    engine: EngineModel, watched: Sequence[Request], stream: Any, limit: int
) -> int:
    """`stream` submits more, each step."""
    for step in range(limit):
        if all(request.end is not None for request in watched):
            return step
        stream()
        engine.step()
    return limit


class Stream:
    """Keeps a number of requests waiting."""

    def __init__(self, engine: EngineModel, tokens: int, shareable: bool):
        self._engine = engine
        self._tokens = tokens
        self._shareable = shareable
        self._sent = 0

    def __call__(self) -> None:
        while len(self._engine.waiting) < 40:
            self._sent += 1
            request = make_request(f"s{self._sent}", [-self._sent] * self._tokens, OUTPUT)
            self._engine.submit(request, self._shareable)


@pytest.mark.parametrize("shareable", [True, False])
def test_a_list_of_large_requests_gets_through_a_stream_of_small_ones(shareable):
    """Each waits at most for what runs when it is at the head of its lane, and for the head of each
    other lane: three times an output, and the steps that prefill."""
    engine = EngineModel(POOL, Policy(chunk=512))
    stream = Stream(engine, 100, shareable)
    for _ in range(50):
        stream()
        engine.step()
    large = requests_of(20, 1500)
    engine.submit_list(large)
    bound = len(large) * 3 * (OUTPUT + 8)
    assert steps_until_all_have_run(engine, large, stream, 6000) <= bound


def test_a_stream_of_lists_lets_a_large_lone_request_through():
    engine = EngineModel(POOL, Policy(chunk=512))
    sent = 0

    def stream() -> None:
        nonlocal sent
        while len(engine.waiting) < 40:
            sent += 1
            engine.submit_list(requests_of(10, 100, first=10_000 * sent))

    for _ in range(50):
        stream()
        engine.step()
    large = requests_of(1, 1500)
    engine.submit(large[0])
    assert steps_until_all_have_run(engine, large, stream, 6000) <= 3 * (OUTPUT + 8)


def test_later_turns_wait_for_no_wave():
    """Gathered requests that do not fit may be waiting for the very memory that programs hold."""
    engine = EngineModel(POOL, Policy(chunk=4096))
    engine.submit_list(requests_of(2, 700))
    engine.step()
    for request in requests_of(2, 1800, first=50):
        engine.submit(request)
    engine.step()
    assert len(engine.waiting) == 2
    later = make_request("later", [77] * 100, OUTPUT)
    engine.pool.admit(later)
    engine.waiting[id(later)] = later
    engine.policy.arrived(Arrival(later, Turn("later", "b", 0), True))
    engine._full = False  # as where a text is held
    time.sleep(0.003)
    engine.step()
    assert later.own == 100


def yielding(engine: EngineModel, requests: list[Request]) -> None:
    engine.submit_list(requests, Turn("once", "batch", 0, yields=True))


@pytest.mark.parametrize("shareable", [True, False])
def test_a_list_that_yields_leaves_the_next_step_to_what_arrives(shareable):
    engine = EngineModel(10**6, Policy(chunk=512))
    batch = requests_of(200, 100)
    yielding(engine, batch)
    for _ in range(3):
        engine.step()
    lone = requests_of(1, 50, first=10_000)
    engine.submit(lone[0], shareable)
    time.sleep(0.003)  # until it has gathered
    before = engine.works[-1]
    engine.step()
    assert before.prefill_tokens == 512
    assert engine.works[-1].prefill_tokens < 512 and lone[0].computed == 50


def test_a_list_that_yields_gets_every_other_step_beside_a_stream():
    engine = EngineModel(10**6, Policy(chunk=512, mixes="all"))
    batch = requests_of(200, 100)
    yielding(engine, batch)
    lone = iter(requests_of(1000, 50, first=10_000))
    steps = steps_until_all_have_run(
        engine, batch, lambda: engine.submit(next(lone), False), len(batch) * 5
    )
    assert steps <= 2 * 200 * 100 / (512 - 50) + 2 * OUTPUT


def test_memory_is_saved_up_for_those_that_a_list_yields_to():
    engine = EngineModel(POOL, Policy(chunk=512))
    yielding(engine, requests_of(400, 90))
    for _ in range(30):
        engine.step()
    large = requests_of(1, 1500, first=10_000)
    engine.submit(large[0], False)
    assert steps_until_all_have_run(engine, large, lambda: None, 1000) <= 2 * OUTPUT + 8


def test_an_ordinary_list_starts_at_once_in_the_room_that_is_kept():
    engine = EngineModel(POOL, Policy(chunk=512))
    yielding(engine, requests_of(400, 90))
    for _ in range(8):
        engine.step()
    held = len(engine.running)
    engine.step()
    assert len(engine.running) == held, "the list that yields has all that it gets"
    small = requests_of(2, 10, first=10_000)
    engine.submit_list(small)
    engine.step()
    assert [request.computed for request in small] == [10, 10]


def waves(count: int, size: int) -> tuple[BatchPolicy, list[Request]]:
    """Gathered requests that run, in `count` batches."""
    engine = EngineModel(10**9, Policy(chunk=10**9, max_running=10**9))
    requests: list[Request] = []
    for wave in range(count):
        prefix = [wave] * 30
        members = [make_request(f"{wave}-{i}", [*prefix, 10**6 + i], 9999) for i in range(size)]
        for request in members:
            engine.submit(request)
        requests += members
        for _ in range(3):
            engine.step()
    assert len(engine.running) + len(engine._prefilled) == count * size
    return engine.policy, requests


def seconds_to_choose(policy: BatchPolicy) -> float:
    """With one request waiting that does not fit, so that all is looked at."""
    policy.arrived(Arrival(make_request("waits", [1] * 10, 10), None, False))
    view = View(
        decoding=600,
        available=10**9 - 10**6,
        max_requests=10,
        chunk_left=0,
        chunk_next=0,
        stepped=True,
        full=False,
    )
    times = []
    for _ in range(7):
        began = time.perf_counter()
        decision = policy.choose(view)
        times.append(time.perf_counter() - began)
        policy.launched([], False)
    assert decision.requests
    return min(times)


def test_a_step_costs_the_same_however_arrivals_were_cut():
    many, _ = waves(300, 2)
    few, _ = waves(3, 200)
    assert seconds_to_choose(many) < 3 * seconds_to_choose(few) + 0.001


def test_an_abort_costs_what_leaves():
    def seconds(waiting: int) -> float:
        engine = EngineModel(10**6, Policy())
        requests = requests_of(waiting, 3)
        engine.submit_list(requests)
        random.Random(0).shuffle(requests)
        began = time.perf_counter()
        for request in requests[:200]:
            engine.policy.departed([request])
        return time.perf_counter() - began

    least = {waiting: min(seconds(waiting) for _ in range(3)) for waiting in (400, 10_000)}
    assert least[10_000] < 5 * least[400] + 0.002  # 25 times if it looked at all


def test_the_rest_of_a_chunked_prompt_is_counted():
    policy = BatchPolicy(EngineModel(900).pool, Limits(900, 1, 512, 0.0))
    policy.arrived(Arrival(make_request("first", [1] * 500, 10), None, False))
    view = {"decoding": 0, "max_requests": 10, "stepped": True, "full": False}
    (first,) = policy.choose(View(available=900, chunk_left=0, chunk_next=0, **view)).requests
    policy.launched([(first, 0)], False)
    policy.arrived(Arrival(make_request("second", [2] * 400, 10), None, False))
    # 100 of the first have slots; 400 more and its output will, and then 400 do not fit beside it.
    assert policy.choose(View(available=800, chunk_left=400, chunk_next=400, **view)).requests == []
    assert member_of(first) is not None


def test_room_for_the_largest_request_shrinks_with_what_outputs_show():
    engine = EngineModel(3000, Policy(chunk=4096))
    prompts = [[group] * 100 + [1000 + i] for group in range(20) for i in range(4)]
    requests = [make_request(str(i), prompt, 4096) for i, prompt in enumerate(prompts)]
    for request in requests:
        request.ends_at = 10
    engine.submit_list(requests)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.policy.pinned_tokens)
    assert most >= 1000, "one prefix at a time while 4,096 tokens may come, then many"
