"""Logprobs of shared tokens: whoever is to read them finds those of its own prompt."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_model import EngineModel, Policy
from kv_model import Request, make_request
from sglang_batchllm.policy.batch import member_of
from sglang_batchllm.policy.rows import Ask, RowLists, RowMemory, Rows
from sglang_batchllm.policy.scored import rows_to_leave, rows_to_read, was_scored
from test_steps import assert_whole, computed, prompt_lists, run_disturbed, seeds

IDS = (3, 8, 5)


def number(*what: Any) -> float:
    """A logprob that tells what it is of."""
    return float(hash(what) % (1 << 24))


def rows_of(prompt: Sequence[int], start: int, stop: int, top: int, ids: Sequence[int]) -> RowLists:
    """What a pass computes at positions [start, stop)."""
    places = [(tuple(prompt[: p + 1]), p) for p in range(start, stop)]
    return RowLists(
        [number(seen, "next", *prompt[p + 1 : p + 2]) for seen, p in places],
        [[number(seen, "top", k) for k in range(top)] for seen, _ in places],
        [[int(number(seen, "id", k)) for k in range(top)] for seen, _ in places],
        [[number(seen, "asked", token) for token in ids] for seen, _ in places],
    )


class ScoringEngine(EngineModel):
    """Fills the rows that its passes leave, and checks those that its requests read."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._launched = self.policy.launched
        self.policy.launched = self._launch  # type: ignore[method-assign]

    def _launch(self, prefilled: Sequence[tuple[Request, int]], idle: bool) -> None:
        leave = [(request, begin, rows_to_leave(request)) for request, begin in prefilled]
        reads = [
            (request, begin, member.ask, rows_to_read(request))
            for request, begin in prefilled
            if (member := member_of(request)) is not None and member.slot < 0 and member.ask
        ]
        self._launched(prefilled, idle)
        for request, begin, left in leave:
            if left is not None:
                ask, kept = left
                self._fill(request, max(begin, ask.start), ask, kept)
        for request, begin, ask, kept in reads:
            parts = [rows.read(ask.start, begin, request.origin_input_ids, ask) for rows in kept]
            expected = rows_of(request.origin_input_ids, ask.start, begin, ask.top, ask.ids)
            for name, wanted in expected._asdict().items():
                found = [value for part in parts for value in getattr(part, name)]
                assert found == wanted, name
        for request, _ in prefilled:
            if request.computed == request.tokens:
                was_scored(request)

    def _fill(self, request: Request, start: int, ask: Ask, kept: list[Rows]) -> None:
        """As a pass does that computes more than is asked, in another order."""
        ids, prompt = (99, *reversed(ask.ids)), request.origin_input_ids
        part = rows_of(prompt, start, request.computed, ask.top + 1, ids)
        for rows in kept:
            rows.fill(start, part, ids)
            if rows.following is not None and start < rows.stop <= request.computed:
                seen = tuple(prompt[: rows.stop])
                rows.following = {token: number(seen, "next", token) for token in rows.following}


def engine_with(
    prompts: list[list[int]], asks: list[Ask | None], capacity: int = 10**6, chunk: int = 40
) -> tuple[ScoringEngine, list[Request]]:
    engine = ScoringEngine(capacity, Policy(chunk=chunk, max_running=8))
    requests = [make_request(str(i), prompt, 4) for i, prompt in enumerate(prompts)]
    engine.submit_list(requests, asks=asks)
    return engine, requests


def random_asks(prompts: list[list[int]], rng: random.Random) -> list[Ask | None]:
    def ask(prompt: list[int]) -> Ask | None:
        if len(prompt) < 2 or rng.random() < 0.3:
            return None
        ids = tuple(rng.sample(IDS, rng.randrange(3)))
        return Ask(rng.randrange(len(prompt) - 1), rng.randrange(3), ids)

    return [ask(prompt) for prompt in prompts]


@settings(max_examples=200, deadline=None)
@given(prompt_lists, seeds)
def test_all_read_their_own_and_nothing_is_computed_twice(
    prompts: list[list[int]], seed: int
) -> None:
    rng = random.Random(seed)
    engine, _ = engine_with(
        prompts,
        random_asks(prompts, rng),
        capacity=rng.choice([20, 30, 60, 10**6]),
        chunk=rng.randint(1, 40),
    )
    engine.run()
    (report,) = engine.policy.report()["batches"]
    if not report["retractions"] and not report["relaxed_tokens"]:
        assert computed(engine) == report["distinct_tokens"]
    assert report["rescored_tokens"] == 0
    assert engine.policy.report()["logprob_bytes"]["now"] == 0
    assert_whole(engine)


@settings(max_examples=200, deadline=None)
@given(prompt_lists, seeds)
def test_aborts_and_retractions_leave_no_rows(prompts: list[list[int]], seed: int) -> None:
    rng = random.Random(seed)
    asks = random_asks(prompts, rng)
    engine, requests = engine_with(prompts, asks, capacity=rng.choice([20, 60, 10**6]), chunk=3)
    run_disturbed(engine, requests, rng)
    assert engine.policy.report()["logprob_bytes"]["now"] == 0
    assert_whole(engine)


@settings(max_examples=100, deadline=None)
@given(prompt_lists, st.integers(0, 2000))
def test_what_does_not_fit_is_computed_again_and_counted(
    prompts: list[list[int]], limit: int
) -> None:
    asks: list[Ask | None] = [Ask(0, 2, IDS) if len(p) > 1 else None for p in prompts]
    engine = ScoringEngine(10**6, Policy(chunk=40, max_running=8))
    engine.policy._row_memory = RowMemory(limit)
    engine.submit_list(
        [make_request(str(i), prompt, 1) for i, prompt in enumerate(prompts)], asks=asks
    )
    engine.run()
    (report,) = engine.policy.report()["batches"]
    assert computed(engine) == report["distinct_tokens"] + report["rescored_tokens"]
    assert engine.policy.report()["logprob_bytes"]["peak"] <= limit
    assert_whole(engine)


def test_a_request_that_asks_for_nothing_leaves_what_others_ask() -> None:
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]]
    engine, requests = engine_with(prompts, [None, None, Ask(0, 1, ())])
    engine.run()
    assert [request.cached_tokens for request in requests].count(3) == 2


@pytest.mark.parametrize("asks_nothing", range(4))
def test_a_prefix_without_its_logprobs_is_computed_again(asks_nothing: int) -> None:
    """It is in the cache, from a list that asked for nothing; whoever leads."""
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]]
    asks = [None if index == asks_nothing else Ask(1, 0, ()) for index in range(3)]
    engine, requests = engine_with(prompts, asks)
    batch = member_of(requests[0]).batch  # type: ignore[union-attr]
    engine.pool._cached[batch.node_id(batch.members[0].home)] = 3
    engine.pool.evictable += 3
    engine.run()
    assert sorted(request.cached_tokens for request in requests) == [1, 3, 3]
