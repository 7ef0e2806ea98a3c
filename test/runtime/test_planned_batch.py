"""A planned batch against a model of the cache: random schedules, chunks, aborts, retractions."""

import random
from array import array
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_batchllm.runtime.batch import PlannedBatch, batch_of
from sglang_batchllm.runtime.forecast import MemoryForecast
from sglang_batchllm.runtime.lookahead import Lookahead
from sglang_batchllm.runtime.report import BatchReport


class ModelCache:
    """A prefix cache that stores every prefix by itself, with locks."""

    def __init__(self) -> None:
        self.cached: set[tuple[int, ...]] = set()
        self.locks: Counter[tuple[int, ...]] = Counter()

    def hit(self, tokens: array) -> int:
        length = 0
        while length < len(tokens) - 1 and tuple(tokens[: length + 1]) in self.cached:
            length += 1
        return length

    def pin(self, tokens: array, namespace: str | None, depth: int) -> tuple[int, ...]:
        prefix = tuple(tokens[:depth])
        for end in range(1, depth + 1):
            assert prefix[:end] in self.cached, "pinned before it was computed, or freed too early"
            self.locks[prefix[:end]] += 1
        return prefix

    def unpin(self, handle: tuple[int, ...], depth: int, free_from: int | None) -> None:
        assert len(handle) == depth
        for end in range(depth, 0, -1):
            self.locks[handle[:end]] -= 1
            assert self.locks[handle[:end]] >= 0
        if free_from is not None:
            self.free(handle, free_from)

    def locked(self, tokens: array, namespace: str | None) -> int:
        return max(
            (end for end in range(len(tokens)) if self.locks[tuple(tokens[:end])]), default=0
        )

    def free(self, prefix: tuple[int, ...], keep: int) -> None:
        for end in range(len(prefix), keep, -1):
            if self.locks[prefix[:end]]:
                return
            if any(p[:end] == prefix[:end] for p in self.cached if len(p) == end + 1):
                return
            self.cached.discard(prefix[:end])


def make_request(tokens: list[int]) -> Any:
    request = SimpleNamespace(
        origin_input_ids=array("q", tokens),
        output_ids=[],
        extra_key=None,
        rid="",
        sampling_params=SimpleNamespace(max_new_tokens=4),
        finished_reason=None,
        already_computed=0,
        cached_tokens=0,
        done=0,
    )
    request.finished = lambda: request.finished_reason is not None
    return request


def end(request: Any, kind: str) -> None:
    request.finished_reason = SimpleNamespace(to_json=lambda: {"type": kind})


class Simulation:
    """Schedules a batch step by step, as the scheduler and SGLang's cache would."""

    def __init__(self, prompts: list[list[int]], rng: random.Random, private: bool = True):
        self.rng = rng
        self.cache = ModelCache()
        self.requests = [make_request(prompt) for prompt in prompts]
        self.report = BatchReport("batch")
        self.batch = PlannedBatch(self.requests, self.cache, 1, self.report, private)
        for request in self.requests:
            self.batch.enqueue(batch_of(request).member)
        self.chunked: Any = None
        self.running: list[Any] = []
        self.computed = 0

    def select(
        self,
        max_tokens: int,
        max_requests: int,
        may_open: Callable[[int, bool], bool] = lambda tokens, is_first: True,
    ) -> list[Any]:
        lookahead = Lookahead(self.batch, MemoryForecast(10**9, 0))
        return self.batch.select(max_tokens, max_requests, lookahead, may_open)

    def prefill_step(self) -> None:
        leaders = [self.chunked] if self.chunked is not None else []
        chosen = self.select(self.rng.randint(1, 40), 8)
        scheduled = chosen[: self.rng.randint(0, len(chosen))]
        for request in chosen:
            member = batch_of(request).member
            self.batch.settle(request, member, request in scheduled)
            if request in scheduled:
                request.cached_tokens = member.matched = self.cache.hit(request.origin_input_ids)
                request.done = member.matched
        computing: set[tuple[int, ...]] = set()
        for request in leaders + scheduled:
            tokens, goal = tuple(request.origin_input_ids), len(request.origin_input_ids)
            is_last = request is (leaders + scheduled)[-1]
            if is_last and goal - request.done > 1 and self.rng.random() < 0.3:
                goal = self.rng.randint(request.done + 1, goal - 1)
            shared = self.batch.pins.depth[batch_of(request).member.home]
            for stop in range(request.done + 1, goal + 1):
                if stop <= shared and stop < len(tokens):
                    assert tokens[:stop] not in computing, "computed twice in one step"
                    computing.add(tokens[:stop])
            self.computed += goal - request.done
            request.done = request.already_computed = goal
        self.chunked = None
        for request in leaders + scheduled:
            planned = batch_of(request)
            if planned.member.claimed:
                shared = min(self.batch.pins.depth[planned.member.home], request.done)
                for stop in range(1, shared + 1):
                    self.cache.cached.add(tuple(request.origin_input_ids[:stop]))
                self.batch.published(planned.member, request.done)
            if request.done < len(request.origin_input_ids):
                self.chunked = request
            else:
                self.running.append(request)

    def decode_step(self, abort: float, retract: float) -> None:
        for request in list(self.running):
            member = batch_of(request).member
            if self.rng.random() < retract:
                self.batch.leave(member, request)
                self.batch.enqueue(member)
            elif self.rng.random() < 0.6:
                end(request, "abort" if self.rng.random() < abort else "length")
                self.batch.leave(member, request)
            else:
                continue
            self.running.remove(request)

    def abort_somewhere(self) -> None:
        waiting = self.batch.waiting()
        if waiting and self.rng.random() < 0.5:
            request = self.rng.choice(waiting)
            self.batch.finish(batch_of(request).member, request)
        elif self.chunked is not None:
            request, self.chunked = self.chunked, None
            member = batch_of(request).member
            tokens, shared = tuple(request.origin_input_ids), self.batch.pins.depth[member.home]
            end(request, "abort")
            if member.claimed:
                self.cache.free(tokens[: min(request.done, shared)], member.matched)
            self.batch.leave(member, request)

    def run(self, abort: float = 0.0, retract: float = 0.0) -> None:
        for _ in range(2000):
            if not self.batch.unfinished:
                break
            self.prefill_step()
            if self.rng.random() < abort:
                self.abort_somewhere()
            self.decode_step(abort, retract)
        assert not self.batch.unfinished, "the batch never finished"
        assert not +self.cache.locks
        assert self.batch.pins.pinned_tokens == 0
        assert self.report.finished + self.report.aborted == self.report.requests


prompt_lists = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=12
)


@settings(max_examples=150)
@given(prompt_lists, st.integers(0, 2**32))
def test_everything_is_computed_once_and_nothing_stays(prompts, seed):
    simulation = Simulation(prompts, random.Random(seed))
    simulation.run()
    assert simulation.computed == simulation.batch.plan.report.distinct_tokens
    assert simulation.report.computed_tokens == simulation.computed
    assert not simulation.cache.cached


@settings(max_examples=150)
@given(prompt_lists, st.integers(0, 2**32))
def test_aborts_and_retractions_leak_nothing(prompts, seed):
    simulation = Simulation(prompts, random.Random(seed))
    simulation.run(abort=0.3, retract=0.3)
    assert not simulation.cache.cached


def test_gathered_prompts_stay_in_the_cache():
    simulation = Simulation([[1, 2, 3], [1, 2, 4]], random.Random(0), private=False)
    simulation.run()
    assert (1, 2) in simulation.cache.cached


def test_members_wait_for_their_leader_and_others_do_not():
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6], [9, 9]]
    simulation = Simulation(prompts, random.Random(0))
    chosen = simulation.select(1000, 1000)
    assert len(chosen) == 2
    assert sum(list(r.origin_input_ids[:3]) == [1, 2, 3] for r in chosen) == 1
    assert sum(list(r.origin_input_ids) == [9, 9] for r in chosen) == 1


def test_a_new_prefix_is_opened_only_with_leave():
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [6, 7, 8, 4], [6, 7, 8, 5]]
    simulation = Simulation(prompts, random.Random(0))
    asked: list[tuple[int, bool]] = []

    def only_the_first(tokens: int, is_first: bool) -> bool:
        asked.append((tokens, is_first))
        return is_first

    assert len(simulation.select(1000, 1000, only_the_first)) == 1
    assert asked == [(3, True), (3, False)]


def test_no_request_is_cut_to_fill_the_last_of_a_step_where_outputs_differ():
    prompts = [[i] * 10 for i in range(1, 30)]
    for differ, max_tokens, begun in (
        *((False, 105, 11), (False, 25, 3), (False, 8, 1)),
        *((True, 105, 10), (True, 80, 8), (True, 25, 3), (True, 8, 1)),
    ):
        simulation = Simulation(prompts, random.Random(0))
        simulation.batch.outputs_differ = differ
        assert len(simulation.select(max_tokens, 1000)) == begun


def test_pins_given_up_are_computed_again():
    """Memory so short that another request needs what is pinned."""
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5], [6, 7]]
    simulation = Simulation(prompts, random.Random(0))
    chosen = simulation.select(1000, 2)
    for request in chosen:
        simulation.batch.settle(request, batch_of(request).member, True)
    leader = next(r for r in chosen if r.origin_input_ids[0] == 1)
    member = batch_of(leader).member
    simulation.cache.cached |= {(1,), (1, 2), (1, 2, 3)}
    simulation.batch.published(member, 4)
    assert simulation.batch.pins.pinned_tokens == 3
    assert simulation.batch.pins.relax(None) == 3
    assert simulation.batch.pins.pinned_tokens == 0
    assert not +simulation.cache.locks
    (other,) = simulation.batch.waiting()
    assert simulation.batch.pins.path_state(batch_of(other).member) == (0, 3)


def test_the_report_counts_what_ran():
    simulation = Simulation([[1, 2, 3], [1, 2, 4], [5]], random.Random(1))
    simulation.run()
    facts = simulation.report.to_dict()
    assert (facts["requests"], facts["finished"], facts["aborted"]) == (3, 3, 0)
    assert facts["computed_tokens"] == facts["distinct_tokens"] == 5
    assert facts["tokens_saved"] == 2
    assert "3 requests" in str(simulation.report)
