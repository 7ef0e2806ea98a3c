"""Lists of prompts, drawn at random: answered as by stock SGLang, errors included."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import Server

EXAMPLES = int(os.environ.get("BATCHLLM_FUZZ_EXAMPLES", "40"))

TEXTS = ["a", "Once upon a time", "Once upon a table", "é 字 \u200b", " ", "", "word " * 3000]
PROMPTS = [[5], [5, 6, 7], list(range(10, 60)), [*range(10, 59), 3], [4] * 3000]

texts = st.sampled_from(TEXTS)
ids = st.sampled_from(PROMPTS)
prompts = st.one_of(
    st.fixed_dictionaries({"text": st.lists(texts, max_size=5)}),
    st.fixed_dictionaries({"input_ids": st.lists(ids, max_size=5)}),
    st.fixed_dictionaries({"text": texts}),
    st.fixed_dictionaries({"input_ids": ids}),
    st.fixed_dictionaries(
        {"text": st.lists(texts, max_size=3), "input_ids": st.lists(ids, max_size=3)}
    ),
    st.fixed_dictionaries({"text": st.lists(st.one_of(texts, st.none(), st.just(3)), max_size=3)}),
)
sampling = st.fixed_dictionaries(
    {"temperature": st.just(0), "max_new_tokens": st.sampled_from([0, 1, 3, 3, 3, 5000])},
    optional={
        "n": st.sampled_from([1, 2]),
        "stop": st.sampled_from(["e", ["a", "b"], 3]),
        "ignore_eos": st.booleans(),
        "top_p": st.sampled_from([1.0, 0.0, 2]),
        "min_new_tokens": st.sampled_from([0, 2, 9]),
        "nonsense": st.just(1),
    },
)
bodies = st.builds(
    lambda prompt, rest: prompt | rest,
    prompts,
    st.fixed_dictionaries(
        {"sampling_params": st.one_of(sampling, sampling, st.lists(sampling, max_size=5))},
        optional={
            "rid": st.sampled_from(["x", ["x", "y"], ["x", "x"], ["x", "y", "z"]]),
            "return_logprob": st.one_of(st.booleans(), st.just([True, False])),
            "top_logprobs_num": st.sampled_from([0, 2, [1, 2]]),
            "token_ids_logprob": st.sampled_from([[1, 2], [100_000], [[1], [2]], "x"]),
            "lora_path": st.sampled_from(["none", [None, "none"]]),
            "extra_key": st.sampled_from(["k", ["k", "l"]]),
            "custom_logit_processor": st.just("x"),
            "return_hidden_states": st.just(True),
        },
    ),
)


@pytest.fixture(scope="module")
def stock_server(tiny_model: Path, starting_server: Server) -> Iterator[Server]:
    server = Server(tiny_model)
    server.wait()
    yield server
    server.stop()


def error_of(content: Any) -> Any:
    """What an answer says went wrong; SGLang has several forms for it."""
    error = content.get("error", content)
    return error.get("message", error) if isinstance(error, dict) else error


def outcome(response: requests.Response) -> Any:
    """What a client sees, without what names the request or the file."""
    content = response.json()
    if response.status_code != 200:
        message = re.sub(r"[0-9a-f]{32}", "id", str(error_of(content)))
        return response.status_code, message
    results = content if isinstance(content, list) else [content]
    return response.status_code, [
        (
            result["output_ids"],
            result["text"],
            result["meta_info"]["finish_reason"],
            result["meta_info"]["prompt_tokens"],
            len(result["meta_info"].get("output_token_logprobs", ())),
        )
        for result in results
    ]


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=bodies)
def test_a_list_is_answered_as_by_stock(server: Server, stock_server: Server, body: dict):
    ours = server.post("/generate", body, timeout=30)
    stock = stock_server.post("/generate", body, timeout=30)
    if stock.status_code == 500:
        assert ours.status_code == 500
    else:
        assert outcome(ours) == outcome(stock)


@pytest.mark.parametrize("prompt", [["a", "a", ""], [""], "", ["word " * 3000, "a"]])
def test_completions_refuse_what_stock_refuses(server: Server, stock_server: Server, prompt: Any):
    body = {"model": "any", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    ours, stock = (each.post("/v1/completions", body) for each in (server, stock_server))
    assert ours.status_code == 400
    if not stock.ok:  # 0.5.23 takes an empty text that is not alone, and answers from nothing
        assert error_of(ours.json()) == error_of(stock.json())


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("input_ids", [[[5], [], [6]], [[]]])
def test_an_empty_row_is_refused(server: Server, input_ids: list[list[int]], n: int):
    """Stock answers it from its neighbour's row, or dies of it; a single one it refuses so."""
    body = {"input_ids": input_ids, "sampling_params": {"max_new_tokens": 2, "n": n}}
    response = server.post("/generate", body, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "input_ids cannot be empty."
    assert server.post("/generate", {"input_ids": [[5], [6]]}, timeout=30).status_code == 200
