"""What a trace finds out is what the program really sends, and costs it nothing else."""

import contextlib
import json
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.ir import SglSamplingParams

import programs
from sglang_batchllm.client.exchange import listening, register_in_process
from sglang_batchllm.client.replay import Replay
from sglang_batchllm.client.tracing import trace_program
from sglang_batchllm.wire.lines import Reply, encode
from sglang_batchllm.wire.request_ids import new_batch_id, parse_request_id

SAMPLING = {"temperature": 0, "stop": [], "stop_token_ids": [], "stop_regex": []}


class Parrot:
    """Answers any request at once, and remembers it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def request(self, path: str, body: dict[str, Any] | None, stream: bool) -> Reply:
        if body is None:
            return Reply(200, {"model_path": "parrot"})
        asked = parse_request_id(body.pop("rid", None))
        assert asked is None or asked.turn == "later"
        self.bodies.append(encode(body))
        one = {"text": "7", "meta_info": META}
        return Reply(200, [one] * len(body["text"]) if isinstance(body["text"], list) else one)

    def hand_over(self, chunks: Any) -> Any:
        raise NotImplementedError


LOGPROBS = [[-1.0, 1, "#"], [-2.0, 2, "#"]]
META = {"prompt_tokens": 9, "input_token_logprobs": LOGPROBS, "output_token_logprobs": LOGPROBS}


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def backend(parrot: Parrot) -> RuntimeEndpoint:
    return RuntimeEndpoint(register_in_process(parrot), chat_template_name="chatml")


def only_caches(body: bytes) -> bool:
    """Whether SGLang sends it before a fork, which it does or not, as its threads happen to run."""
    return json.loads(body)["sampling_params"] == {"max_new_tokens": 0}


def trace(function: Any, backend: RuntimeEndpoint, **arguments: Any) -> Any:
    return trace_program(sgl.function(function), backend, arguments, SglSamplingParams(**SAMPLING))


@pytest.mark.parametrize("form", programs.FORMS)
def test_the_traced_requests_are_those_of_the_real_run(parrot, backend, form):
    found = trace(form, backend, document=1, question=2)
    assert parrot.bodies == [], "a trace sends nothing"
    sgl.function(form).run(document=1, question=2, backend=backend, **SAMPLING).sync()
    real = [body for body in parrot.bodies if not only_caches(body) or body in found.requests]
    assert sorted(real[: len(found.requests)]) == sorted(found.requests)
    assert len(found.requests) == {"survey": 4}.get(form.__name__, 1)
    assert found.more == (form is not programs.ask)


@pytest.mark.parametrize("form", programs.FORMS)
def test_a_replay_leaves_only_the_rest_to_the_server(parrot, backend, form):
    """The program gets the same answers, and what was handed over is not sent again."""
    found = trace(form, backend, document=0, question=5)
    program = sgl.function(form)
    expected = program.run(document=0, question=5, backend=backend, **SAMPLING)
    expected.sync()
    everything, parrot.bodies = parrot.bodies, []
    answers = [Reply(200, {"text": "7", "meta_info": META}) for _ in found.requests]
    replay = Replay(found, answers, new_batch_id(), 0)
    with listening(replay):
        state = program.run(document=0, question=5, backend=backend, **SAMPLING)
        state.sync()
    assert state.text() == expected.text()
    rest = [body for body in everything if body not in found.requests and not only_caches(body)]
    assert sorted(body for body in parrot.bodies if not only_caches(body)) == sorted(rest)
    assert replay.went_on == bool(rest)


def test_arguments_are_as_they_were(backend):
    def program(s: Any, items: list[str]) -> None:
        s += items.pop() + sgl.gen("a")

    items = ["x", "y"]
    assert len(trace(program, backend, items=items).requests) == 1
    assert items == ["x", "y"]


def test_a_program_that_catches_everything_stops_all_the_same(backend):
    def program(s: Any) -> None:
        s += "start" + sgl.gen("a")
        with contextlib.suppress(Exception):
            int(s["a"])
        raise AssertionError("it went on without an answer")

    found = trace(program, backend)
    assert len(found.requests) == 1 and found.more


def test_nothing_is_known_of_a_program_that_raises_or_runs_another(parrot, backend):
    def raises(s: Any) -> None:
        s += "start" + sgl.gen("a")
        raise KeyError("b")

    def runs_another(s: Any) -> None:
        s += sgl.function(programs.ask).run(document=0, question=0, backend=backend).text()
        s += sgl.gen("a")

    def several_samples(s: Any) -> None:
        s += sgl.gen("a", n=2)

    for function in (raises, runs_another, several_samples):
        assert trace(function, backend).requests == []
    assert parrot.bodies == []


def test_reading_what_is_known_needs_no_model(backend):
    def program(s: Any) -> None:
        s["x"] = "known"
        with s.var_scope("y"):
            s += "text " + s["x"]
        assert s.text() == "text known" and s["y"] == "text known"
        s += s["y"] + sgl.gen("a")
        s["y"] = s["a"]
        raise AssertionError("it went on without an answer")

    assert [
        b'"text": "text knowntext known"' in body for body in trace(program, backend).requests
    ] == [True]
