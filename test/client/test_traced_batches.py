"""Many programs are traced in order, at the cost of few, and beside each other where they wait."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.ir import SglSamplingParams

import programs
from pretended import PretendedEngine
from sglang_batchllm.client import room, run_batch, traces
from sglang_batchllm.client.traces import Traces
from sglang_batchllm.client.tracing import Trace, trace_program

SAMPLING = SglSamplingParams(temperature=0, stop=[], stop_token_ids=[], stop_regex=[])


class Tracer:
    """Notes what it is asked, and by how many threads at a time."""

    def __init__(self, seconds: Any):
        self._seconds = seconds  # of a program
        self._lock = threading.Lock()
        self.begun: list[int] = []
        self._inside = 0
        self.most_inside = 0

    def __call__(self, index: int) -> Trace:
        with self._lock:
            self.begun.append(index)
            self._inside += 1
            self.most_inside = max(self.most_inside, self._inside)
        time.sleep(self._seconds(index))
        with self._lock:
            self._inside -= 1
        trace = Trace()
        trace.requests.append(str(index).encode())
        return trace


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def in_order(found: Any) -> bool:
    return all(trace.requests == [str(index).encode()] for index, trace in found)


def test_slow_programs_beside_each_other_and_in_order(pool):
    tracer = Tracer(lambda index: 0.005 + 0.01 * (index % 3))
    found = list(Traces(tracer, range(100, 300), pool, 16))
    assert [index for index, _ in found] == list(range(100, 300))
    assert in_order(found)
    assert sorted(tracer.begun) == list(range(100, 300)), "each once"
    assert 8 < tracer.most_inside <= 17


def test_quick_programs_in_one_thread(pool, monkeypatch):
    monkeypatch.setattr(traces, "SLOW_SECONDS", 60)  # a machine may pause for longer than it is
    tracer = Tracer(lambda index: 0.001)
    assert in_order(Traces(tracer, range(500), pool, 16))
    assert tracer.begun == list(range(500))
    assert tracer.most_inside == 1


def test_one_slow_program_among_quick_ones_holds_back_the_others_only_so_far(pool):
    tracer = Tracer(lambda index: 0.3 if index == 40 else 0.003)
    found = iter(Traces(tracer, range(400), pool, 16))
    assert in_order(islice(found, 40))
    time.sleep(0.2)
    assert len(tracer.begun) <= 40 + 2 * 16, "more traces than may be held"
    assert in_order(found)


def test_what_is_left_is_not_traced(pool):
    tracer = Tracer(lambda index: 0.003)
    found = iter(Traces(tracer, range(400), pool, 4))
    assert in_order(islice(found, 20))
    found.close()
    time.sleep(0.05)
    begun = len(tracer.begun)
    time.sleep(0.05)
    assert len(tracer.begun) == begun < 40


def test_200_programs_that_work_before_they_ask():
    """20 ms each: 4 s in a row, and once more for the real runs; SGLang takes 0.3 s for all."""
    engine = PretendedEngine()

    def program(s: Any, number: int) -> None:
        time.sleep(0.02)
        s += f"{number}" + sgl.gen("a", max_tokens=2)

    rows = [{"number": i} for i in range(200)]
    started = time.monotonic()
    states = sgl.function(program).run_batch(rows, backend=engine.backend())
    seconds = time.monotonic() - started
    print(f"{seconds:.2f} s")
    assert engine.handed_over == [list(range(200))]
    assert [state["a"] for state in states] == [f"<{i}>" for i in range(200)]
    assert seconds < 1.5


def test_arguments_that_are_none_are_an_error_of_their_program():
    """Here their trace is made by a helper."""
    engine = PretendedEngine()
    finished = []

    def program(s: Any, number: int) -> None:
        time.sleep(0.01)
        s += f"{number}" + sgl.gen("a", max_tokens=2)
        finished.append(len(s["a"]))

    rows: list[Any] = [{"number": i} for i in range(40)]
    rows[30] = None
    with pytest.raises(AttributeError, match="NoneType"):
        sgl.function(program).run_batch(rows, backend=engine.backend())
    assert len(finished) == 39


def fork(s: Any, number: int) -> None:
    s += f"{number} "
    branches = s.fork(2)
    for branch in branches:
        branch += sgl.gen("a", max_tokens=2)
    s += branches[0]["a"] + sgl.gen("b", max_tokens=2)


def test_a_batch_is_handed_over_in_parts_that_a_server_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "MAX_REQUESTS", 41)
    engine = PretendedEngine()
    rows = [{"number": i} for i in range(100)]
    states = sgl.function(fork).run_batch(rows, backend=engine.backend())
    assert [sorted({*part}) for part in engine.handed_over] == [
        [*range(start, start + 20)] for start in range(0, 100, 20)
    ]
    assert [state["b"] for state in states] == [f"<{i} <{i} >>" for i in range(100)]


def test_what_a_server_never_takes_runs_as_it_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(room, "MAX_REQUESTS", 1)
    caplog.set_level("WARNING", "sglang_batchllm")
    engine = PretendedEngine()
    rows = [{"number": i} for i in range(5)]
    states = sgl.function(fork).run_batch(rows, backend=engine.backend())
    assert "no room for 2 requests" in caplog.text
    assert [state["b"] for state in states] == [f"<{i} <{i} >>" for i in range(5)]


def test_a_part_goes_once_there_is_room_for_it(monkeypatch: pytest.MonkeyPatch):
    """The first ones of many go ahead, and the next beside them."""
    monkeypatch.setattr(room, "MAX_REQUESTS", 10)
    monkeypatch.setattr(run_batch, "WHOLE", 8)
    monkeypatch.setattr(run_batch, "FIRST_PART", 4)
    engine = PretendedEngine()

    def program(s: Any, number: int) -> None:
        s += f"{number}" + sgl.gen("a", max_tokens=2)

    rows = [{"number": i} for i in range(30)]
    states = sgl.function(program).run_batch(rows, backend=engine.backend())
    assert [one for part in engine.handed_over for one in part] == [*range(30)]
    assert engine.handed_over[0] == [*range(4)]
    assert max(map(len, engine.handed_over)) <= 10
    assert [state["a"] for state in states] == [f"<{i}>" for i in range(30)]


class Stop(BaseException):
    """No Exception."""


def test_whatever_a_program_raises_is_raised():
    engine = PretendedEngine()

    def program(s: Any, number: int) -> None:
        if number == 3:
            raise Stop("here")
        s += f"{number}" + sgl.gen("a", max_tokens=2)

    with pytest.raises(Stop, match="here"):
        sgl.function(program).run_batch([{"number": i} for i in range(8)], backend=engine.backend())


def test_2000_cheap_programs_cost_what_they_cost_one_by_one(pool):
    engine = PretendedEngine()
    backend = engine.backend()
    program = sgl.function(programs.ask)
    rows = programs.arguments(2000)

    def trace(index: int) -> Trace:
        return trace_program(program, backend, rows[index], SAMPLING)

    def cost(make: Any) -> float:
        """CPU seconds of all threads; the least of three, as others use the machine, too."""
        least = float("inf")
        for _ in range(3):
            started = time.process_time()
            make()
            least = min(least, time.process_time() - started)
        return least

    alone = cost(lambda: [trace(index) for index in range(2000)])
    together = cost(lambda: list(Traces(trace, range(2000), pool, 16)))
    print(f"{alone / 2000 * 1e6:.0f} µs each alone, {together / 2000 * 1e6:.0f} µs together")
    assert together < 1.5 * alone + 0.02
