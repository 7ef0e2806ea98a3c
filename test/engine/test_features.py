"""What SGLang does for each request it also does inside a batch."""

import json
from typing import Any

import pytest

from engines import API_KEY, CONTEXT_LENGTH, SERVER_PAGE_SIZE, flush
from prompts import distinct_tokens
from sglang_batchllm.client.get_report import get_report

PREFIX = list(range(10, 90))
BATCH = [[*PREFIX, token] for token in range(100, 108)]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def generate(engine: Any, **options: Any) -> Any:
    flush(engine)
    options.setdefault("input_ids", BATCH)
    options.setdefault("sampling_params", GREEDY)
    return engine.generate(**options)


def same_as_stock(engine: Any, stock_engine: Any, **options: Any) -> Any:
    ours, stock = generate(engine, **options), generate(stock_engine, **options)
    assert [r["output_ids"] for r in ours] == [r["output_ids"] for r in stock]
    assert [r["meta_info"]["finish_reason"] for r in ours] == [
        r["meta_info"]["finish_reason"] for r in stock
    ]
    return ours, stock


def test_each_request_keeps_its_sampling_parameters(engine, stock_engine):
    params = [{**GREEDY, "max_new_tokens": 1 + i} for i in range(len(BATCH))]
    params[3] |= {"stop_token_ids": [5], "min_new_tokens": 2}
    params[4] |= {"frequency_penalty": 1.5, "logit_bias": {"17": 5.0}}
    ours, _ = same_as_stock(engine, stock_engine, sampling_params=params)
    assert [len(r["output_ids"]) for r in ours][:3] == [1, 2, 3]


def test_no_output_at_all(engine, stock_engine):
    same_as_stock(engine, stock_engine, sampling_params={"temperature": 0, "max_new_tokens": 0})


def test_several_samples_of_each_prompt(engine):
    sampling = {"temperature": 1.0, "max_new_tokens": 6, "n": 3, "ignore_eos": True}
    results = generate(engine, sampling_params=sampling)
    assert len(results) == 3 * len(BATCH)
    assert all(len(r["output_ids"]) == 6 for r in results)
    assert len({tuple(r["output_ids"]) for r in results[:3]}) > 1


@pytest.mark.parametrize("one", [False, True])
def test_samples_are_planned_together(engine, stock_engine, one):
    """In SGLang's order; a prompt is computed once, and its last token for every sample."""
    prompts = BATCH[:1] if one else BATCH
    sampling = {**GREEDY, "n": 3}
    before = get_report(engine)["total"]
    ours, _ = same_as_stock(engine, stock_engine, input_ids=prompts, sampling_params=sampling)
    assert [r["output_ids"] for r in ours[::3]] == [r["output_ids"] for r in ours[2::3]]
    report = get_report(engine)
    assert report["total"]["requests"] - before["requests"] == 3 * len(prompts)
    computed = report["total"]["computed_tokens"] - before["computed_tokens"]
    assert computed == distinct_tokens([prompt for prompt in prompts for _ in range(3)])
    if not one:
        assert report["batches"][-1]["requests"] == 3 * len(prompts)
    assert not engine.tokenizer_manager.rid_to_state


def test_output_logprobs(engine, stock_engine):
    ours, stock = same_as_stock(engine, stock_engine, return_logprob=True, top_logprobs_num=2)
    for mine, theirs in zip(ours, stock, strict=True):
        mine_lp = [entry[0] for entry in mine["meta_info"]["output_token_logprobs"]]
        their_lp = [entry[0] for entry in theirs["meta_info"]["output_token_logprobs"]]
        assert mine_lp == pytest.approx(their_lp, abs=1e-3)
        assert len(mine["meta_info"]["output_top_logprobs"]) == len(mine_lp)


def test_stop_strings(engine, stock_engine):
    texts = [f"{'once ' * 30} there were {i}" for i in range(6)]
    plain = generate(engine, input_ids=None, prompt=texts, sampling_params=GREEDY)
    stop = plain[0]["text"][1:3]
    params = {**GREEDY, "max_new_tokens": 20, "stop": [stop]}
    ours, _ = same_as_stock(
        engine, stock_engine, input_ids=None, prompt=texts, sampling_params=params
    )
    assert ours[0]["meta_info"]["finish_reason"]["type"] == "stop"


def test_json_schema_mixed_with_plain_requests(engine):
    constrained = {"temperature": 0, "max_new_tokens": 60, "json_schema": '{"type": "boolean"}'}
    params = [constrained if i % 2 else GREEDY for i in range(len(BATCH))]
    results = generate(engine, sampling_params=params)
    for i, result in enumerate(results):
        if i % 2:
            assert isinstance(json.loads(result["text"]), bool)
        else:
            assert len(result["output_ids"]) == 6


@pytest.mark.parametrize("n", [1, 2])
def test_streaming_a_batch(engine, n):
    sampling = {**GREEDY, "n": n}
    whole = generate(engine, sampling_params=sampling)
    flush(engine)
    seen: dict[int, list[int]] = {}
    for chunk in engine.generate(input_ids=BATCH, sampling_params=sampling, stream=True):
        seen[chunk["index"]] = chunk["output_ids"]
    assert [len(seen[i]) for i in range(n * len(BATCH))] == [6] * n * len(BATCH)
    assert [seen[i] for i in range(n * len(BATCH))] == [r["output_ids"] for r in whole]


def test_samples_over_http(server):
    """Of several prompts and of one, in SGLang's shape, and as OpenAI's choices."""
    texts = ["once there was " * 20 + word for word in ("one", "two", "three")]
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True, "n": 2}
    flush(server)
    answers = server.post("/generate", {"text": texts, "sampling_params": sampling}).json()
    assert len(answers) == 6
    report = get_report(server.url, API_KEY)["batches"][-1]
    assert report["requests"] == 6
    assert report["computed_tokens"] == report["distinct_tokens"] < report["prompt_tokens"] / 4
    body = {"text": texts[1], "sampling_params": sampling}
    assert [one["text"] for one in server.post("/generate", body).json()] == [
        one["text"] for one in answers[2:4]
    ]
    body = {"model": "x", "prompt": texts, "max_tokens": 4, "temperature": 0, "n": 2}
    flush(server)
    choices = server.post("/v1/completions", body | {"ignore_eos": True}).json()["choices"]
    assert [choice["text"] for choice in choices] == [one["text"] for one in answers]
    again = get_report(server.url, API_KEY)["batches"][-1]
    assert (again["requests"], again["computed_tokens"]) == (6, report["computed_tokens"])


def test_samples_of_a_chat_over_http(server):
    """The conversation is one node of a plan, computed once, and each sample a choice."""
    messages = [{"role": "user", "content": "once there was a lighthouse " * 20}]
    body = {"model": "x", "messages": messages, "max_tokens": 4, "temperature": 0}
    body |= {"ignore_eos": True}
    (alone,) = server.post("/v1/chat/completions", body).json()["choices"]
    flush(server)
    before = get_report(server.url, API_KEY)["total"]
    answer = server.post("/v1/chat/completions", body | {"n": 3}).json()
    assert answer["choices"] == [alone | {"index": index} for index in range(3)]
    prompt = answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 3 * 4
    after = get_report(server.url, API_KEY)["total"]
    new = {name: after[name] - before[name] for name in before}
    assert (new["requests"], new["groups"], new["grouped_requests"]) == (3, 1, 3)
    own = (prompt - 1) % SERVER_PAGE_SIZE + 1
    assert new["prompt_tokens"] == 3 * prompt > 9 * SERVER_PAGE_SIZE
    assert new["computed_tokens"] == prompt + 2 * own


def test_samples_of_a_list_with_a_prompt_that_is_too_long(engine):
    prompts = [*BATCH, [7] * (CONTEXT_LENGTH + 1)]
    with pytest.raises(ValueError, match="context length"):
        engine.generate(input_ids=prompts, sampling_params={**GREEDY, "n": 2})
    assert not engine.tokenizer_manager.rid_to_state
    assert len(generate(engine)) == len(BATCH)


def test_a_prompt_that_is_too_long_does_not_harm_the_server(server):
    body = {"input_ids": [*BATCH, [3] * 5000], "sampling_params": GREEDY}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert "context length" in response.text
    good = server.post("/generate", {"input_ids": BATCH, "sampling_params": GREEDY}).json()
    assert all(len(r["output_ids"]) == 6 for r in good)


def test_prompts_of_different_salts_share_nothing(server):
    flush(server)
    body = {"input_ids": BATCH, "sampling_params": GREEDY, "extra_key": ["a", "b"] * 4}
    results = server.post("/generate", body).json()
    computed = sum(
        r["meta_info"]["prompt_tokens"] - r["meta_info"]["cached_tokens"] for r in results
    )
    assert len(PREFIX) % SERVER_PAGE_SIZE == 0
    assert computed == 2 * len(PREFIX) + len(BATCH)
    assert [r["output_ids"] for r in results] == [
        r["output_ids"]
        for r in server.post("/generate", {"input_ids": BATCH, "sampling_params": GREEDY}).json()
    ]


def test_the_report_is_behind_the_api_key(server):
    import requests

    assert requests.get(server.url + "/batchllm/report", timeout=30).status_code == 401
    assert server.get("/batchllm/report").status_code == 200
