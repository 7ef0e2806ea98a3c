"""The policy, driven by a model of the engine: random batches, chunks, aborts, retractions."""

import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_model import Work
from engine_model import EngineModel, Policy
from kv_model import Request, make_request
from sglang_batchllm.policy.admission.short import decode_next
from sglang_batchllm.policy.batch import member_of
from sglang_batchllm.policy.core import BatchPolicy
from sglang_batchllm.policy.step import Arrival, Limits, View, WindowPool
from token_pool import TokenPool

prompt_lists = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=2, max_size=12
)
seeds = st.integers(0, 2**32)


def engine_with(
    prompts: list[list[int]], capacity: int = 10**6, chunk: int = 40, output: int = 4
) -> tuple[EngineModel, list[Request]]:
    engine = EngineModel(capacity, Policy(chunk=chunk, max_running=8))
    requests = [make_request(str(i), prompt, output) for i, prompt in enumerate(prompts)]
    engine.submit_list(requests)
    return engine, requests


def view(**changes: Any) -> View:
    """Of an engine that is idle and has much memory."""
    facts = {"decoding": 0, "available": 10**6, "max_requests": 1000}
    facts |= {"chunk_left": 0, "chunk_next": 0, "stepped": True, "full": False}
    return View(**(facts | changes))


def computed(engine: EngineModel) -> int:
    return sum(work.prefill_tokens for work in engine.works)


def assert_whole(engine: EngineModel) -> None:
    assert engine.pool.used == 0
    assert not +engine.pool._locks
    assert engine.policy.pinned_tokens == 0
    assert not engine.policy.report()["running"]
    assert not len(engine.policy._running)


def run_disturbed(engine: EngineModel, requests: list[Request], rng: random.Random) -> None:
    """To the end, with aborts and retractions now and then."""
    for _ in range(2000):
        if not engine.busy:
            break
        engine.step()
        if rng.random() < 0.3:
            alive = [request for request in requests if request.end is None]
            if alive:
                engine.abort(rng.choice(alive))
        if engine.running and rng.random() < 0.3:
            engine.retract(rng.choice(engine.running))
    assert not engine.busy, "the batch never finished"


@settings(max_examples=150, deadline=None)
@given(prompt_lists, seeds)
def test_everything_is_computed_once_and_nothing_is_held(prompts, seed):
    rng = random.Random(seed)
    engine, _ = engine_with(
        prompts, capacity=rng.choice([20, 30, 60, 10**6]), chunk=rng.randint(1, 40)
    )
    engine.run()
    (report,) = engine.policy.report()["batches"]
    if not report["retractions"] and not report["relaxed_tokens"]:
        assert computed(engine) == report["distinct_tokens"] == report["computed_tokens"]
    assert report["finished"] == report["requests"] == len(prompts)
    assert report["output_tokens"] == 4 * len(prompts)
    assert_whole(engine)


@settings(max_examples=150, deadline=None)
@given(prompt_lists, seeds)
def test_aborts_and_retractions_leak_nothing(prompts, seed):
    rng = random.Random(seed)
    engine, requests = engine_with(prompts, capacity=rng.choice([20, 60, 10**6]), chunk=3)
    run_disturbed(engine, requests, rng)
    (report,) = engine.policy.report()["batches"]
    assert report["finished"] + report["aborted"] == len(prompts)
    assert_whole(engine)


def test_members_wait_for_their_leader_and_others_do_not():
    engine, _ = engine_with([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6], [9, 9]])
    chosen = engine.policy.choose(view()).requests
    assert sorted(list(r.origin_input_ids[:2]) for r in chosen) == [[1, 2], [9, 9]]


def test_a_pass_begins_as_many_prefixes_as_there_are_slots_for_states():
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 4], [6, 7, 8, 5], [9, 9], [5]]
    for recurrent, slots, begun in ((False, 100, 4), (True, 100, 4), (True, 5, 3), (True, 0, 0)):
        windows = WindowPool(1, 100, 0, recurrent=recurrent)
        policy = BatchPolicy(TokenPool(1000), Limits(1000, 1, 40, 0.0, windows=windows))
        requests = [make_request(str(i), prompt, 4) for i, prompt in enumerate(prompts)]
        policy.list_arrived([Arrival(one, None, True) for one in requests], requests)
        chosen = policy.choose(view(available=1000, window_available=slots)).requests
        assert len(chosen) == begun, (recurrent, slots)


def chosen_with_states(prompts: list[list[int]], slots: int, chunk: int) -> int:
    """Requests of a list that begin in an idle engine whose layers keep states."""
    windows = WindowPool(1, slots, 0, recurrent=True)
    policy = BatchPolicy(TokenPool(1000), Limits(1000, 1, chunk, 0.0, windows=windows))
    requests = [make_request(str(i), prompt, 4) for i, prompt in enumerate(prompts)]
    policy.list_arrived([Arrival(one, None, True) for one in requests], requests)
    return len(policy.choose(view(available=1000, window_available=slots)).requests)


def test_a_pass_is_full_of_what_leads_to_the_next_states():
    """Of each prompt that begins a prefix, not of what is behind that."""
    prompts = [[group] * 3 + [9, end] * 10 for group in range(1, 6) for end in (7, 8)]
    assert chosen_with_states(prompts, slots=100, chunk=10) == 3


def test_where_states_are_scarce_those_that_save_little_are_not_kept():
    """Four pairs need twelve: one leads each of them, or all are loose."""
    prompts = [[group] * 3 + [9, end] for group in range(1, 5) for end in (7, 8)]
    assert chosen_with_states(prompts, slots=12, chunk=40) == 4
    assert chosen_with_states(prompts, slots=11, chunk=40) == 8


def test_nobody_waits_for_a_prefix_that_is_in_the_cache():
    engine, requests = engine_with([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]])
    batch = member_of(requests[0]).batch  # type: ignore[union-attr]
    engine.pool._cached[batch.node_id(batch.members[0].home)] = 3
    engine.pool.evictable += 3
    assert len(engine.policy.choose(view()).requests) == 3
    assert engine.policy.pinned_tokens == 3


def test_a_new_prefix_is_opened_only_where_any_request_can_still_run():
    """A third group, the last in the order, needs 35 tokens for one of its requests."""
    small = [[1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 4], [6, 7, 8, 5]]
    large = [[9] * 29 + [1], [9] * 29 + [2]]
    for capacity, begun in ((40, 1), (60, 2)):
        engine, _ = engine_with([*small, *large], capacity, chunk=10)
        chosen = engine.policy.choose(view(available=capacity)).requests
        assert len(chosen) == begun


def test_no_request_is_cut_to_fill_the_last_of_a_step_where_outputs_differ():
    prompts = [[i] * 10 for i in range(1, 30)]
    for differ, max_tokens, begun in (
        *((False, 105, 11), (False, 25, 3), (False, 8, 1)),
        *((True, 105, 10), (True, 80, 8), (True, 25, 3), (True, 8, 1)),
    ):
        engine = EngineModel(10**6, Policy(chunk=max_tokens))
        requests = [make_request(str(i), prompt, 40) for i, prompt in enumerate(prompts)]
        if differ:
            requests[0].sampling_params.max_new_tokens = 50
        engine.submit_list(requests)
        assert len(engine.policy.choose(view()).requests) == begun


def kinds(works: list[Work]) -> str:
    """A letter for each step: P prefills, D decodes, M does both."""
    return "".join(
        "D" if not work.prefill_tokens else "M" if work.decode_requests else "P" for work in works
    )


def test_short_answers_decode_between_prefill_steps():
    for output, most in ((1, 10), (4, 2), (8, 2), (9, 10)):
        engine = EngineModel(10**6, Policy(chunk=4000))
        prompts = [[i] * 20 for i in range(2000)]
        engine.submit_list([make_request(str(i), p, output) for i, p in enumerate(prompts)])
        steps = kinds(engine.run())
        assert max(map(len, steps.split("D"))) == most  # prefill steps in a row
        assert steps.count("P") == 10


def test_short_answers_decode_in_steps_that_prefill_where_the_engine_mixes():
    for output, steps in ((1, "P" * 10), (4, "P" + "M" * 11), (9, "P" * 10)):
        engine = EngineModel(10**6, Policy(chunk=4000, mixes="short"))
        prompts = [[i] * 20 for i in range(2000)]
        engine.submit_list([make_request(str(i), p, output) for i, p in enumerate(prompts)])
        works = engine.run()
        assert kinds(works).rstrip("D") == steps
        assert all(work.prefill_tokens + work.decode_requests <= 4000 for work in works)


def test_short_answers_do_not_ride_in_steps_that_are_half_empty():
    engine = EngineModel(10**6, Policy(chunk=4000, mixes="short"))
    for begin in range(0, 2000, 40):  # 20 tokens each
        some = range(begin, begin + 40)
        engine.submit_list([make_request(str(i), [i] * 20, 4) for i in some])
        engine.step()
    steps = kinds(engine.run())
    assert "M" not in steps
    assert max(map(len, steps.split("D"))) == 7  # prefill steps in a row, until 256 rows decode


def test_nobody_decodes_where_all_have_ended():
    assert not decode_next(np.zeros(0, np.int64), decoding=300)
    assert not decode_next(np.array([4, 0]), decoding=300)  # one may decode any number of tokens
    assert decode_next(np.array([4, 1]), decoding=300)


def test_short_answers_wait_for_nobody_who_decodes_long():
    engine = EngineModel(10**6, Policy(chunk=4000))
    engine.submit(make_request("long", [1] * 20, 100))
    engine.step()
    engine.submit_list([make_request(str(i), [i] * 20, 4) for i in range(2000)])
    assert "P" * 10 in kinds(engine.run())


def test_requests_that_decode_leave_some_of_a_chunk_to_prompts():
    """They count as its tokens, and SGLang cuts prompts at what is left."""
    for decoding, mixed in ((0, False), (39, True), (40, False)):
        engine = EngineModel(10**6, Policy(chunk=40, mixes="all"))
        engine.submit_list([make_request(str(i), [1, i], 4) for i in range(4)])
        assert engine.policy.choose(view(decoding=decoding)).mixed == mixed


def test_pins_given_up_are_computed_again():
    """Another list needs the memory that is pinned."""
    engine, requests = engine_with([[1, 2, 3, 4], [1, 2, 3, 5]], output=2)
    engine.step()
    assert engine.policy.pinned_tokens == 3
    (member,) = [m for m in map(member_of, requests) if m is not None and m.slot < 0]
    assert member.batch is not None
    assert member.batch.pins.relax(None) == 3
    assert engine.policy.pinned_tokens == 0
    assert member.batch.pins.path_state(member) == (0, 3)


def test_what_a_list_leaves_stays_only_while_memory_keeps_nobody_out():
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5]]
    engine, _ = engine_with(prompts)
    engine.run()
    assert engine.pool.evictable == 3
    engine, _ = engine_with([[i] * 10 for i in range(40)] + prompts, capacity=60)
    engine.run()
    assert engine.policy.report()["total"]["retractions"] == 0
    assert engine.pool.evictable == 0


def test_labels_of_a_long_list_leave_nothing_nor_do_short_answers_to_little():
    for size, own, output, kept in (
        (256, 200, 1, False),
        (255, 200, 1, True),
        (256, 200, 2, True),
        (256, 64, 2, False),
        (256, 64, 8, False),
        (256, 65, 8, True),
        (256, 64, 9, True),
        (255, 64, 2, True),
    ):
        prompts = [[1, 2, *[3 + index] * own] for index in range(size)]
        engine, requests = engine_with(prompts, output=output)
        assert engine.policy.keeps(requests[0]) == kept, (size, own, output)


def test_the_report_counts_all_that_ran():
    engine, _ = engine_with([[1, 2, 3], [1, 2, 4], [5]])
    engine.run()
    engine.submit(make_request("alone", [1, 2, 3, 9], 4))
    engine.submit(make_request("unshared", [1, 2, 3], 4), shareable=False)
    engine.run()
    report = engine.policy.report()
    total, (batch,) = report["total"], report["batches"]
    assert (batch["requests"], batch["computed_tokens"], batch["tokens_saved"]) == (3, 5, 2)
    assert (total["requests"], total["finished"], total["output_tokens"]) == (5, 5, 20)
    assert total["prompt_tokens"] == 14
    assert total["distinct_tokens"] == 5 + 1 + 1  # 9 after 1 2 3, and the last of 1 2 3 again
    assert total["computed_tokens"] == 5 + 4 + 3  # the model caches for planned requests only
    assert total["seconds"] > 0
