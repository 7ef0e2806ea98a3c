"""Programs that do otherwise when they run than when they were traced."""

import itertools
import logging
from typing import Any

import pytest
import sglang as sgl

from pretended import PretendedEngine

LOGGER = "sglang_batchllm.client.replay"


@pytest.fixture
def engine() -> PretendedEngine:
    return PretendedEngine()


@pytest.fixture
def log(caplog):
    """The lines that were logged, by level."""
    caplog.set_level(logging.INFO, LOGGER)
    return lambda level: [r.getMessage() for r in caplog.records if r.levelno == level]


def drifting(part: float) -> Any:
    """A program of which this part asks something else each time that it runs."""
    calls = itertools.count()

    def program(s: Any, number: int) -> None:
        call = next(calls)
        own = number * part % 1 < part  # evenly spread
        s += f"{number}" + (f" at {call}" if own else "")
        s += sgl.gen("a", max_tokens=2)
        s["asked"] = s.text().partition("<")[0]
        s += s["a"] + sgl.gen("b", max_tokens=2)

    return sgl.function(program)


def check(states: Any) -> None:
    """Each program has the answer to what it really asked."""
    for state in states:
        assert state.error() is None
        assert state["a"] == f"<{state['asked']}>"


def test_the_first_one_is_told_of_once_and_few_stop_the_rest(engine, log):
    backend = engine.backend()
    program = drifting(1)
    states = program.run_batch([{"number": i} for i in range(200)], backend=backend)
    check(states)
    (warning,) = log(logging.WARNING)
    assert "drifting.<locals>.program" in warning and "computed twice" in warning
    assert "before run_batch" in warning
    assert "strayed" in log(logging.INFO)[0]
    assert [len(programs) for programs in engine.handed_over] == [200]
    assert engine.aborted > 150, "the hand-over went on"
    assert len(engine.direct) == 400, "each program's two turns, none for the trace"

    check(program.run_batch([{"number": i} for i in range(20)], backend=backend))
    assert len(engine.handed_over) == 1, "a later batch is SGLang's own business"
    assert len(log(logging.WARNING)) == 1


def test_a_few_in_many_stop_nothing(engine, log):
    program = drifting(1 / 16)
    check(program.run_batch([{"number": i} for i in range(200)], backend=engine.backend()))
    assert len(log(logging.WARNING)) == 1
    assert log(logging.INFO) == []
    assert engine.aborted == 0
    assert len(engine.direct) == 200 + 13  # second turns, and the first ones that strayed


def test_the_second_list_is_not_handed_over_then(engine, monkeypatch, log):
    from sglang_batchllm.client import run_batch

    monkeypatch.setattr(run_batch, "WHOLE", 100)
    monkeypatch.setattr(run_batch, "FIRST_PART", 50)
    program = drifting(1)
    states = program.run_batch([{"number": i} for i in range(300)], backend=engine.backend())
    check(states)
    assert len(log(logging.WARNING)) == 1
    assert sum(map(len, engine.handed_over)) - engine.aborted < 100, "too many were answered"


def test_a_program_whose_run_finds_nothing_left(engine, log):
    """What it takes from a queue was taken by its trace."""
    queue = [str(i) for i in range(8)]

    def program(s: Any, number: int) -> None:
        s += queue.pop() + sgl.gen("a", max_tokens=2)

    with pytest.raises(IndexError):
        sgl.function(program).run_batch([{"number": i} for i in range(8)], backend=engine.backend())
    assert len(log(logging.WARNING)) == 1


@pytest.mark.parametrize("joined", [True, False])
def test_forks_and_failures_are_no_strays(engine, log, joined):
    def program(s: Any, number: int) -> None:
        s += f"Number {number}"
        forks = s.fork(3)
        for index, fork in enumerate(forks):
            fork += f"part {index}" + sgl.gen("part", max_tokens=2)
            fork += "more" + sgl.gen("rest", max_tokens=2)
        if joined:
            forks.join()
        s += sgl.gen("a", max_tokens=2)
        s += s["a"] + sgl.gen("b", max_tokens=2)
        if number == 3:
            raise KeyError("third")

    with pytest.raises(KeyError, match="third"):
        sgl.function(program).run_batch(
            [{"number": i} for i in range(40)], backend=engine.backend()
        )
    assert log(logging.WARNING) == []
