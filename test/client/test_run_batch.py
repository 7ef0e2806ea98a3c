"""`run_batch` on a batch that the runtime knows whole: same results, everything computed once."""

import copy
import itertools
import json
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import sglang as sgl
from PIL import Image
from sglang.lang.ir import SglSamplingParams

import programs
from engines import API_KEY, flush, wait_until_whole
from programs import FORMS, arguments
from prompts import distinct_tokens
from sglang_batchllm.client import run_batch
from sglang_batchllm.client.channel import find_channel
from sglang_batchllm.client.tracing import trace_program
from sglang_batchllm.edge.engine_backend import EngineBackend
from sglang_batchllm.planning import plan_batch
from sglang_batchllm.wire.lines import encode, request_line
from sglang_batchllm.wire.request_ids import new_batch_id

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def remote(server) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(server.url, api_key=API_KEY, chat_template_name="chatml")


@pytest.fixture(scope="module")
def local(engine) -> Any:
    return EngineBackend(engine, "chatml")


@pytest.fixture(scope="module")
def stock(stock_engine) -> EngineBackend:
    return EngineBackend(stock_engine, "chatml")


def texts(states: Any) -> list[str]:
    assert [state.error() for state in states if state.error() is not None] == []
    return [state.text() for state in states]


def test_who_is_asked_for_the_flag(remote, local, stock):
    assert find_channel(remote) is not None
    assert find_channel(local) is not None
    assert find_channel(stock) is None
    assert find_channel(object()) is None


@pytest.mark.parametrize("where", ["remote", "local"])
def test_a_hand_over_ends_when_all_programs_have(request, where):
    channel = find_channel(request.getfixturevalue(where))
    assert channel is not None
    batch, body = new_batch_id(), encode({"text": "Once", "sampling_params": {"max_new_tokens": 2}})
    lines = [request_line(program, body, more=True) for program in range(3)]
    answered = []
    for answer in channel.hand_over(batch, lines):
        if answer is not None:
            answered.append(answer[0])
            channel.end_programs(batch, {answer[0]: False})
    assert sorted(answered) == [0, 1, 2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["remote", "local"])
def test_every_form_of_program_gives_what_stock_gives(request, stock, where, form):
    program = sgl.function(form)
    backend = request.getfixturevalue(where)
    expected = program.run_batch(arguments(12), backend=stock, **GREEDY)
    states = program.run_batch(arguments(12), backend=backend, **GREEDY)
    assert texts(states) == texts(expected)
    for state, reference in zip(states, expected, strict=True):
        assert state.stream_executor.variables == reference.stream_executor.variables


def test_the_next_turn_finds_the_prompt_of_the_first(local, engine):
    flush(engine)
    states = sgl.function(programs.judge).run_batch(arguments(40), backend=local, **GREEDY)
    for state in states:
        first, second = state.get_meta_info("grade"), state.get_meta_info("why")
        assert second["cached_tokens"] >= first["prompt_tokens"]


def test_scarce_memory_changes_no_answer(scarce_engine, stock):
    """The pool holds two or three programs; prefixes come and go between turns."""
    for form in (programs.judge, programs.survey):
        program = sgl.function(form)
        states = program.run_batch(arguments(24), backend=scarce_engine, **GREEDY)
        expected = program.run_batch(arguments(24), backend=stock, **GREEDY)
        assert texts(states) == texts(expected)


def test_scarce_memory_holds_what_a_program_will_continue(scarce_engine):
    """Left to eviction, all of these texts are gone before their second turn."""
    states = sgl.function(programs.judge).run_batch(arguments(48), backend=scarce_engine, **GREEDY)
    turns = [(state.get_meta_info("grade"), state.get_meta_info("why")) for state in states]
    found = sum(why["cached_tokens"] >= grade["prompt_tokens"] for grade, why in turns)
    assert found > 24  # not all: a program that is slow loses its text
    wait_until_whole(scarce_engine)


def test_slow_programs_do_not_keep_the_memory_from_others(scarce_engine):
    def program(s: Any, number: int) -> None:
        s += f"Number {number}: " + "word " * 20 + sgl.gen("a", max_tokens=2)
        assert s["a"]
        time.sleep(3)
        s += sgl.gen("b", max_tokens=2)

    rows = [{"number": i} for i in range(48)]
    started = time.monotonic()
    states = sgl.function(program).run_batch(rows, backend=scarce_engine, **GREEDY)
    assert time.monotonic() - started < 24  # three at a time would take 48
    assert all(state["b"] for state in states)


def choose_and_explain(s: Any, document: int, question: int) -> None:
    """Choices of several tokens, each continued."""
    s += programs.DOCUMENTS[document] + f"{question}: "
    s += sgl.select("mood", choices=["glad as the morning sun", "sad as rain", "neither, all told"])
    # SGLang's select fails where a text ends in two tokens that are no characters of their own.
    s += sgl.gen("why", max_tokens=2) + " Sure: "
    s += sgl.select("sure", choices=["yes", "no"])
    s += sgl.gen("more", max_tokens=2)


@pytest.mark.parametrize("form", [programs.choose, choose_and_explain, programs.survey])
def test_select_computes_no_more_than_in_stock(engine, local, stock_engine, stock, form):
    """Stock runs one program after the other, in which it computes least."""
    program = sgl.function(form)
    flush(engine)
    flush(stock_engine)
    with counting() as ours:
        states = program.run_batch(arguments(24), backend=local, **GREEDY)
    with counting() as theirs:
        expected = program.run_batch(arguments(24), backend=stock, num_threads=1, **GREEDY)
    assert texts(states) == texts(expected)
    print(f"{form.__name__}: stock {theirs.tokens}, ours {ours.tokens} tokens")
    assert 0 < ours.tokens <= theirs.tokens


@dataclass
class Computed:
    """Prompt tokens that engines in this process have computed."""

    tokens: int = 0


@contextmanager
def counting() -> Iterator[Computed]:
    computed = Computed()
    lock = threading.Lock()
    check = EngineBackend._assert_success

    def note(self: EngineBackend, reply: Any) -> None:
        check(self, reply)
        content = reply.json()
        infos = [one["meta_info"] for one in (content if isinstance(content, list) else [content])]
        with lock:
            computed.tokens += sum(i["prompt_tokens"] - i["cached_tokens"] for i in infos)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineBackend, "_assert_success", note)
        yield computed


def test_an_engine_is_a_backend(engine, stock):
    program = sgl.function(programs.ask)
    states = program.run_batch(arguments(6), backend=engine, **GREEDY)
    assert texts(states) == texts(program.run_batch(arguments(6), backend=stock, **GREEDY))
    state = program.run(document=1, question=1, backend=engine, stream=True, **GREEDY)
    assert "".join(state.text_iter()) == states[1].text()


def test_2000_programs_compute_each_prompt_token_once(engine, local, stock):
    program = sgl.function(programs.mixed)
    kinds = ["ask", "judge", "survey"]
    batch = [{"kind": kinds[i % 3], **row} for i, row in enumerate(arguments(2000))]
    sampling = SglSamplingParams(stop=[], stop_token_ids=[], stop_regex=[], **GREEDY)

    started = time.process_time()  # of this machine's cores others may have their share
    traces = [trace_program(program, local, row, sampling) for row in batch]
    tracing_seconds = time.process_time() - started
    assert [len(trace.requests) for trace in traces[:3]] == [1, 1, 4]
    prompts = [json.loads(body)["text"] for trace in traces for body in trace.requests]

    flush(engine)
    states = program.run_batch(batch, backend=local, **GREEDY)
    first = [info for state in states for info in state["first"]]
    computed = sum(info["prompt_tokens"] - info["cached_tokens"] for info in first)
    assert computed == distinct_tokens(engine.tokenizer_manager.tokenizer(prompts)["input_ids"])

    started = time.process_time()
    plan_batch([*engine.tokenizer_manager.tokenizer(prompts)["input_ids"]], 1, [2] * len(prompts))
    planning_seconds = time.process_time() - started
    print(f"traced in {tracing_seconds:.2f} s, planned in {planning_seconds:.2f} s")
    assert tracing_seconds + planning_seconds < 2

    assert texts(states) == texts(program.run_batch(batch, backend=stock, **GREEDY))


def test_a_large_batch_goes_in_two_lists(server, remote, stock, monkeypatch):
    monkeypatch.setattr(run_batch, "WHOLE", 12)
    monkeypatch.setattr(run_batch, "FIRST_PART", 5)
    program = sgl.function(programs.ask)
    states = program.run_batch(arguments(30), backend=remote, **GREEDY)
    assert texts(states) == texts(program.run_batch(arguments(30), backend=stock, **GREEDY))
    batches = wait_until_whole(server.url, API_KEY)["batches"][-2:]  # as they finished
    assert sorted(batch["requests"] for batch in batches) == [5, 25]


def test_bad_input_fails_alone_and_as_in_stock(remote, stock):
    """A prompt that is too long, and a grammar that is none, each among good ones."""

    def program(s: Any, length: int, pattern: str | None) -> None:
        s += "word " * length + sgl.gen("a", max_tokens=2, json_schema=pattern)

    rows = [{"length": 10 + i, "pattern": None} for i in range(8)]
    rows[2]["length"] = 5000
    rows[5]["pattern"] = "no schema"
    ours = sgl.function(program).run_batch(rows, backend=remote, **GREEDY)
    theirs = sgl.function(program).run_batch(rows, backend=stock, **GREEDY)
    for index, (state, reference) in enumerate(zip(ours, theirs, strict=True)):
        error = state.error()
        assert repr(error) == repr(reference.error())
        assert state.stream_executor.variables == reference.stream_executor.variables
        if index in (2, 5):
            assert type(error) is RuntimeError
            assert "a" not in state
        else:
            assert error is None
            assert len(state["a"]) > 0
    assert "longer than the model's context length" in str(ours[2].error())
    assert "grammar" in str(ours[5].error())


@pytest.mark.parametrize("where", ["remote", "stock"])
def test_a_program_that_raises_does_so_after_the_others_finished(request, where):
    finished = []

    def program(s: Any, number: int) -> None:
        if number == 3:
            raise KeyError("third")
        s += f"number {number}" + sgl.gen("a", max_tokens=2)
        finished.append(len(s["a"]))

    backend = request.getfixturevalue(where)
    with pytest.raises(KeyError, match="third"):
        sgl.function(program).run_batch(
            [{"number": i} for i in range(8)], backend=backend, **GREEDY
        )
    assert len(finished) == 7


def test_an_unreachable_server_is_an_error_of_each_program(remote):
    gone = copy.copy(remote)
    gone.base_url = "http://127.0.0.1:9"
    program = sgl.function(programs.ask)
    states = program.run_batch(arguments(4), backend=gone, **GREEDY)
    assert all(isinstance(state.error(), urllib.error.URLError) for state in states)


def test_what_was_not_handed_over_runs_as_it_comes(remote, stock, tmp_path):
    """Programs that need the model at once, an image, or several samples."""
    picture = tmp_path / "dot.png"
    Image.new("RGB", (2, 2)).save(picture)
    ask = sgl.function(programs.ask)

    def nested(s: Any, number: int) -> None:
        inner = ask.run(document=0, question=number, backend=s.stream_executor.backend, **GREEDY)
        s += inner["answer"] + sgl.gen("a", max_tokens=2)

    def image(s: Any, number: int) -> None:
        s += f"{number} " + sgl.image(str(picture)) + sgl.gen("a", max_tokens=2)

    def samples(s: Any, number: int) -> None:
        s += f"{number} " + sgl.gen("a", max_tokens=2, n=2)

    for program in (nested, image, samples):
        rows = [{"number": i} for i in range(4)]
        ours = sgl.function(program).run_batch(rows, backend=remote, **GREEDY)
        theirs = sgl.function(program).run_batch(rows, backend=stock, **GREEDY)
        assert [state.text() for state in ours] == [state.text() for state in theirs]
        assert [str(s.error()) for s in ours] == [str(s.error()) for s in theirs]


def test_a_program_that_is_not_deterministic_gets_the_answer_to_what_it_asks(remote):
    """Its real prompts differ from the traced ones."""
    calls = itertools.count()

    def program(s: Any, number: int) -> None:
        s["call"] = next(calls)
        s += f"call {s['call']}: " + sgl.gen("a", max_tokens=2)

    rows = [{"number": i} for i in range(6)]
    states = sgl.function(program).run_batch(rows, backend=remote, **GREEDY)
    assert sorted(state["call"] for state in states) == list(range(6, 12))

    def asked_directly(s: Any, call: int) -> None:
        s += f"call {call}: " + sgl.gen("a", max_tokens=2)

    for state in states:
        direct = sgl.function(asked_directly).run(call=state["call"], backend=remote, **GREEDY)
        assert state.text() == direct.text()


@pytest.mark.parametrize("where", ["remote", "local", "stock"])
def test_a_later_turn_fails_in_its_state(request, where):
    def program(s: Any, number: int) -> None:
        s += f"Number {number}: " + sgl.gen("a", max_tokens=2)
        s += "word " * (5000 if number == 1 else 1) + sgl.gen("b", max_tokens=2)

    rows = [{"number": i} for i in range(4)]
    backend = request.getfixturevalue(where)
    states = sgl.function(program).run_batch(rows, backend=backend, **GREEDY)
    assert [type(state.error()) for state in states] == [
        type(None) if row["number"] != 1 else RuntimeError for row in rows
    ]
    assert all(state["a"] for state in states)
    assert ["b" in state for state in states] == [True, False, True, True]


def test_a_request_that_was_not_traced_fails_in_its_state(remote):
    calls = itertools.count()

    def program(s: Any, number: int) -> None:
        s += "word " * (1 if next(calls) < 4 else 5000) + sgl.gen("a", max_tokens=2)

    rows = [{"number": i} for i in range(4)]
    states = sgl.function(program).run_batch(rows, backend=remote, **GREEDY)
    assert all("longer than the model's context" in str(state.error()) for state in states)


def test_generator_style_yields_in_order_and_can_be_left(remote, server):
    program = sgl.function(programs.ask)
    states = program.run_batch(arguments(20), backend=remote, generator_style=True, **GREEDY)
    whole = program.run_batch(arguments(20), backend=remote, **GREEDY)
    assert [state.text() for state in states] == texts(whole)

    def endless(s: Any, question: int) -> None:
        s += f"{question}" + sgl.gen("a", max_tokens=2 if question == 0 else 1500)

    rows = [{"question": i} for i in range(12)]
    for state in sgl.function(endless).run_batch(
        rows, backend=remote, generator_style=True, **GREEDY
    ):
        assert state["a"]
        break
    assert wait_until_whole(server.url, API_KEY)["batches"][-1]["aborted"] > 0


def test_num_threads_and_progress_bar(remote, capfd):
    inside: list[int] = []
    most: list[int] = []

    def program(s: Any, number: int) -> None:
        s += f"{number}" + sgl.gen("a", max_tokens=2)
        len(s["a"])
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(number)

    rows = [{"number": i} for i in range(20)]
    sgl.function(program).run_batch(
        rows, backend=remote, num_threads=3, progress_bar=True, **GREEDY
    )
    assert 1 < max(most) <= 3
    shown = [line for line in capfd.readouterr().err.splitlines() if "%|" in line]
    assert "20/20" in shown[-1] and "\r" not in shown[-1]
