"""Same tokens as Hugging Face and stock SGLang, and no prompt token computed twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from engines import API_KEY, SCARCE, SERVER_PAGE_SIZE, flush
from prompts import distinct_tokens, mixed_batch
from sglang_batchllm.client.get_report import get_report

OUTPUT_LEN = 12
GREEDY = {"temperature": 0, "max_new_tokens": OUTPUT_LEN, "ignore_eos": True}


@pytest.fixture(scope="module")
def batch() -> list[list[int]]:
    return mixed_batch(200)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, batch: list[list[int]]) -> list[list[int]]:
    """Greedy token ids from Hugging Face transformers."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    outputs = []
    with torch.inference_mode():
        for prompt in batch:
            step, cache, output = torch.tensor([prompt]), None, []
            for _ in range(OUTPUT_LEN):
                result = model(step, past_key_values=cache, use_cache=True)
                cache, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
                output.append(int(step))
            outputs.append(output)
    return outputs


def output_ids(results: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [result["output_ids"] for result in results]


def computed_tokens(results: Sequence[dict[str, Any]]) -> int:
    return sum(r["meta_info"]["prompt_tokens"] - r["meta_info"]["cached_tokens"] for r in results)


def assert_pool_is_whole(report: dict[str, Any]) -> None:
    kv = report["kv_tokens"]
    assert kv["pinned"] == kv["held"] == 0
    assert kv["free"] + kv["evictable"] == kv["total"]


def run(engine: Any, batch: list[list[int]]) -> list[dict[str, Any]]:
    flush(engine)
    return engine.generate(input_ids=batch, sampling_params=GREEDY)


def test_stock_sglang_agrees_with_transformers(stock_engine, batch, expected):
    results = run(stock_engine, batch)
    assert output_ids(results) == expected
    print(f"\ncomputed prompt tokens: stock SGLang {computed_tokens(results):,}, "
          f"distinct {distinct_tokens(batch):,}")  # fmt: skip
    assert computed_tokens(results) > distinct_tokens(batch)


@pytest.mark.parametrize("kind", ["engine", "scarce_engine"])
def test_every_shared_token_is_computed_once(request, kind, batch, expected):
    engine = request.getfixturevalue(kind)
    results = run(engine, batch)
    assert output_ids(results) == expected
    print(f"\ncomputed prompt tokens: {kind} {computed_tokens(results):,}")
    assert computed_tokens(results) == distinct_tokens(batch)

    report = get_report(engine)
    assert report["running"] == []
    last = report["batches"][-1]
    assert last["finished"] == last["requests"] == len(batch)
    assert last["prompt_tokens"] == sum(map(len, batch))
    assert last["distinct_tokens"] == last["computed_tokens"] == distinct_tokens(batch)
    assert last["peak_pinned_tokens"] > 0
    assert_pool_is_whole(report)


def test_a_list_that_comes_again_finds_its_prompts(engine, batch):
    """While there is room, what a list leaves stays; its report says so."""
    again = batch[:8]
    before = get_report(engine)["total"]
    flush(engine)
    first = run(engine, again)
    second = engine.generate(input_ids=again, sampling_params=GREEDY)
    assert output_ids(second) == output_ids(first)
    assert computed_tokens(second) == len(again)
    report = get_report(engine)
    total, last = report["total"], report["batches"][-1]
    assert last["computed_tokens"] == 8 < last["distinct_tokens"]
    assert total["requests"] - before["requests"] == total["finished"] - before["finished"] == 16
    assert total["output_tokens"] - before["output_tokens"] == sum(
        len(result["output_ids"]) for result in first + second
    )
    assert total["distinct_tokens"] <= total["computed_tokens"]
    assert_pool_is_whole(report)


@pytest.mark.parametrize("hint", ["", "#out=4"])
def test_scarce_memory_is_really_scarce(scarce_engine, batch, expected, hint):
    """The largest prompts leave room for two or three requests. Admission foresees that; where
    the caller promises far too little, requests are retracted, and still end well."""
    wide = [p for p in batch if len(p) > 60][:24]
    long_outputs = {**GREEDY, "max_new_tokens": 120}
    flush(scarce_engine)
    rids = [f"wide-{index}{hint}" for index in range(len(wide))]
    results = scarce_engine.generate(input_ids=wide, sampling_params=long_outputs, rid=rids)
    last = get_report(scarce_engine)["batches"][-1]
    assert (last["retractions"] > 0) == bool(hint)
    assert SCARCE / 2 < last["peak_kv_tokens"] <= SCARCE
    assert [r["output_ids"][:OUTPUT_LEN] for r in results] == [
        expected[batch.index(p)] for p in wide
    ]
    assert all(len(r["output_ids"]) == 120 for r in results)
    assert computed_tokens(results) == distinct_tokens(wide)
    assert_pool_is_whole(get_report(scarce_engine))


def test_http_with_pages_of_16_gives_the_same(server, batch, expected):
    flush(server)
    results = server.post("/generate", {"input_ids": batch, "sampling_params": GREEDY}).json()
    assert output_ids(results) == expected
    assert computed_tokens(results) == distinct_tokens(batch, SERVER_PAGE_SIZE)
    report = get_report(server.url, api_key=API_KEY)
    assert report["batches"][-1]["computed_tokens"] == distinct_tokens(batch, SERVER_PAGE_SIZE)
    assert_pool_is_whole(report)


def test_text_prompts_travel_as_one_batch(engine, batch):
    texts = [f"An introduction. {'word ' * 40}Question {i % 20}?" for i in range(60)]
    flush(engine)
    results = engine.generate(prompt=texts, sampling_params=GREEDY)
    ids = [engine.tokenizer_manager.tokenizer.encode(text) for text in texts]
    assert computed_tokens(results) == distinct_tokens(ids)
    last = get_report(engine)["batches"][-1]
    assert last["requests"] == 60


def test_deep_nesting(engine):
    """Every prompt a prefix of the next: a chain of groups 120 levels deep."""
    whole = mixed_batch(1, seed=5)[0][:1] + list(range(2, 242))
    chain = [whole[:length] for length in range(2, 242, 2)]
    flush(engine)
    results = engine.generate(input_ids=chain[::-1], sampling_params=GREEDY)
    assert computed_tokens(results) == distinct_tokens(chain)
    assert_pool_is_whole(get_report(engine))


def test_prefixes_cached_before_a_batch_are_used_and_kept(engine, batch):
    flush(engine)
    prompt = max(batch, key=len)
    engine.generate(input_ids=prompt, sampling_params=GREEDY)
    before = get_report(engine)["kv_tokens"]["evictable"]
    assert before >= len(prompt)
    results = engine.generate(input_ids=[prompt, [*prompt, 9]], sampling_params=GREEDY)
    assert computed_tokens(results) == 2
    assert get_report(engine)["kv_tokens"]["evictable"] >= before
    assert computed_tokens(engine.generate(input_ids=[prompt], sampling_params=GREEDY)) == 1
