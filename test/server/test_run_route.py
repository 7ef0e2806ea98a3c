"""The added routes of a real server: what they refuse, and that nothing blocks them."""

import json
import threading
import time
from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from engines import API_KEY, Server, wait_until_whole
from sglang_batchllm.wire.lines import Reply, read_answers, request_line
from sglang_batchllm.wire.paths import RUN_PATH
from sglang_batchllm.wire.request_ids import new_batch_id

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


def run(server: Server, data: Any, batch: str | None = None) -> requests.Response:
    return requests.post(
        f"{server.url}{RUN_PATH}/{batch or new_batch_id()}",
        data=data,
        headers=HEADERS,
        stream=True,
        timeout=30,
    )


def chat(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "messages": messages, "max_tokens": 3, "temperature": 0, **more}


def read(response: requests.Response) -> dict[int, Reply]:
    assert response.status_code == 200, response.text
    return dict(each for each in read_answers(response.iter_lines()) if each is not None)


def request(text: Any, **options: Any) -> dict[str, Any]:
    return {"text": text, "sampling_params": GREEDY} | options


def test_a_line_is_answered_as_by_generate(server: Server):
    """Each of them by itself, in one hand-over."""
    bodies: list[Any] = [
        request("Once"),
        [1],
        "x",
        5,
        request(5),
        request(""),
        request(["a", "b"]),
        request("a", sampling_params={**GREEDY, "n": 2}),
        request("word " * 5000),
        {"input_ids": []},
        {"input_ids": [5], "sampling_params": {"temperature": -1}},
        request("a", sampling_params=[1]),
        request("a", sampling_params="q"),
        request("a", nonsense=1),
        request("a", lora_path="none"),
        {"input_embeds": [[0.5]]},
        {},
        request("Once"),
    ]
    data = b"".join(request_line(0, json.dumps(each).encode(), False) for each in bodies)
    answers = read(run(server, data))
    assert sorted(answers) == list(range(len(bodies)))
    for index, each in enumerate(bodies):
        stock = server.post("/generate", each)
        reply = answers[index]
        assert reply.status_code == stock.status_code, each
        content = stock.json()
        if stock.status_code == 200:
            ours = [reply.content] if isinstance(reply.content, dict) else reply.content
            theirs = [content] if isinstance(content, dict) else content
            assert [one["text"] for one in ours] == [one["text"] for one in theirs]
        elif "error" in content:
            assert reply.content == content
        else:  # FastAPI's; it adds the place in SGLang's source
            errors = content["message"].split("\n\n")[0]
            assert reply.content["message"].startswith(errors)


OPENAI: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        chat("Once upon"),
        chat("Once upon", n=2),
        chat("Once", logprobs=True, top_logprobs=2),
        chat("Once upon", stream=True),
        chat("Once", temperature=-1),
        chat("word " * 5000),
        chat("Once", response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        {"model": "m", "messages": []},
        {"model": "m", "messages": [{"role": "user"}]},
        {"model": "m"},
    ],
    "/v1/completions": [
        {"model": "m", "prompt": "Once", "max_tokens": 3, "temperature": 0},
        {"model": "m", "prompt": ["Once", "upon"], "max_tokens": 3, "temperature": 0},
        {"model": "m", "prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0, "echo": True},
        {"model": "m", "prompt": "", "max_tokens": 3},
        {"model": "m", "max_tokens": 3},
    ],
}


@pytest.mark.parametrize("url", OPENAI)
def test_requests_for_openais_endpoints_are_answered_as_there(server: Server, url: str):
    bodies = OPENAI[url]
    data = b"".join(request_line(0, json.dumps(each).encode(), False, url) for each in bodies)
    answers = read(run(server, data))
    assert sorted(answers) == list(range(len(bodies)))
    statuses = set()
    for index, each in enumerate(bodies):
        alone = server.post(url, {**each, "stream": False} if "stream" in each else each)
        statuses.add(alone.status_code)
        assert answers[index].status_code == alone.status_code, each
        if alone.status_code == 200:
            assert essence(answers[index].content) == essence(alone.json())
        else:
            errors = alone.json()["message"].split("\n\n")[0]
            assert answers[index].content["message"].startswith(errors.split("[{")[0])
    assert statuses == {200, 400}


def test_a_body_of_openais_that_is_no_object_fails_alone(server: Server):
    bodies = [b"null", b"[]", b'"a"', json.dumps(chat("Once")).encode()]
    data = b"".join(request_line(0, each, False, "/v1/chat/completions") for each in bodies)
    answers = read(run(server, data))
    assert [answers[index].status_code for index in range(4)] == [400, 400, 400, 200]


def essence(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: in the last digits, logprobs do."""
    for choice in answer["choices"]:
        choice["logprobs"] = choice["logprobs"] is not None
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


def test_text_that_no_tokenizer_takes_fails_alone(server: Server):
    data = b"".join(
        request_line(index, each, False)
        for index, each in enumerate(
            [b'{"text":"a"}', b'{"text":"\\ud800"}', b'{"text":"b"}', b"null"]
        )
    )
    answers = read(run(server, data))
    assert [answers[index].status_code // 100 for index in range(4)][::2] == [2, 2]
    assert answers[1].status_code >= 400 and answers[3].status_code == 400


@pytest.mark.parametrize("data", [b"x" * 100, b"5\n"], ids=["one line", "many lines"])
def test_a_body_beyond_the_limits_is_refused_in_constant_memory(server: Server, data: bytes):
    before = resident(server.process.pid)
    chunk = data * (1 << 20)
    response = run(server, (chunk for _ in range((64 << 20) // len(chunk) + 1)))
    assert response.status_code == 413
    assert "at most" in response.json()["error"]["message"]
    assert resident(server.process.pid) - before < 300 << 20


def resident(process: int) -> int:
    with open(f"/proc/{process}/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_ids_carry_no_rights(server: Server):
    """Others cannot end a batch, reuse its id, or hold memory by ids that they made up."""
    line = request_line(0, json.dumps(request("Once")).encode(), True)
    batch = new_batch_id()
    response = run(server, line, batch)
    assert run(server, line, batch).status_code == 409
    assert server.post(f"{RUN_PATH}/{new_batch_id()}/ended", {0: True}).status_code == 404
    assert server.post(f"{RUN_PATH}/{batch}/ended", {1: True}).status_code == 200
    for turn in ("once", "first", "later"):
        rids = [f"batchllm-{turn}-{new_batch_id()}-{i}-0" for i in range(20)]
        each = {"text": ["Once upon a time"] * 20, "sampling_params": GREEDY, "rid": rids}
        assert server.post("/generate", each).status_code == 200
        alone = request("Once upon a time", rid=f"batchllm-{turn}-{new_batch_id()}-0-0")
        assert server.post("/generate", alone).status_code == 200
    assert server.post(f"{RUN_PATH}/{batch}/ended", {0: False}).status_code == 200
    assert [reply.status_code for reply in read(response).values()] == [200]
    assert server.post(f"{RUN_PATH}/{batch}/ended", {0: False}).status_code == 404
    wait_until_whole(server.url, API_KEY)


@pytest.mark.parametrize("delay", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("how", ["update", "pause"])
def test_a_weight_update_or_pause_blocks_nothing(
    server: Server, tiny_model: Any, delay: float, how: str
):
    """Before the hand-over is prepared, meanwhile, and while it runs."""
    each = json.dumps(request("Once upon a time there was " + "word " * 20)).encode()
    data = b"".join(request_line(index, each, False) for index in range(1500))
    answers: dict[int, Reply] = {}
    client = threading.Thread(target=lambda: answers.update(read(run(server, data))))
    client.start()
    time.sleep(delay)
    if how == "update":
        body = {"model_path": str(tiny_model)}
        assert server.post("/update_weights_from_disk", body, timeout=60).json()["success"]
    else:
        assert server.post("/pause_generation", {"mode": "abort"}, timeout=60).ok
        assert server.post("/continue_generation", {}, timeout=60).ok
    assert server.post("/generate", request("Twice"), timeout=30).status_code == 200
    client.join(60)
    assert len(answers) == 1500
    statuses = Counter(reply.status_code for reply in answers.values())
    assert statuses.keys() <= ({200} if how == "update" else {200, 499}), statuses
    wait_until_whole(server.url, API_KEY)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@schemathesis.serializer("application/x-ndjson")
def as_lines(context: Any, value: Any) -> bytes:
    """The line twice, and once more without an end. Nobody sends what programs would send later,
    so that none waits for it."""
    if isinstance(value, dict) and value.get("more") is True:
        value = value | {"more": False}
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"\n".join([line] * 3)


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_routes_do_what_their_description_says(server: Server, mode: GenerationMode):
    """Given what the description allows, and what it does not."""
    description = server.get("/openapi.json").json()
    paths = {path: each for path, each in description["paths"].items() if "/batchllm/" in path}
    assert set(paths[RUN_PATH + "/{batch}"]) == {"post"}
    if mode is GenerationMode.NEGATIVE:  # the others take nothing that could be wrong
        paths = {path: each for path, each in paths.items() if "{batch}" in path}
    schema = schemathesis.openapi.from_dict(description | {"paths": paths})

    def probe(case: schemathesis.Case) -> None:
        response = case.call(base_url=server.url, headers=HEADERS, timeout=30)
        case.validate_response(response, CHECKS)

    for found in schema.get_all_operations():
        strategy = found.ok().as_strategy(generation_mode=mode)
        settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))(
            given(case=strategy)(probe)
        )()
    assert server.get("/health").ok
