"""How a window becomes partitions, and what a row sends and gets; without Ray's processes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from prompts import distinct_tokens, mixed_batch
from sglang_batchllm.ray_data.partitions import ERROR, expected_output, pack, partitions, unpack
from sglang_batchllm.ray_data.processor import BatchLLMProcessorConfig
from sglang_batchllm.ray_data.replica import line_of, output_of, parts
from sglang_batchllm.wire.lines import MAX_LINE_BYTES, Reply


def rows_of(prompts: list[list[int]]) -> list[dict[str, Any]]:
    params = {"max_new_tokens": 3, "temperature": 0}
    return [
        {"id": number, "tokenized_prompt": np.array(prompt), "sampling_params": params}
        for number, prompt in enumerate(prompts)
    ]


def test_partitions_share_out_all_rows_and_keep_what_shares_together():
    prompts = mixed_batch(120)
    found = partitions(rows_of(prompts), 2, 1)
    assert sorted(row["id"] for mine in found for row in mine) == [*range(120)]
    assert all(mine == sorted(mine, key=lambda row: row["id"]) for mine in found)
    computed = [distinct_tokens([prompts[row["id"]] for row in mine]) for mine in found]
    assert max(computed) < 0.6 * sum(computed)
    assert sum(computed) <= 1.01 * distinct_tokens(prompts)


def test_rows_without_a_prompt_go_with_the_first_partition():
    rows = rows_of([[1, 2], [3, 4], [5, 6], [7]])
    rows[1][ERROR] = "a stage before gave up"
    rows[2]["tokenized_prompt"] = np.array([], int)
    del rows[3]["tokenized_prompt"]
    (first, *_) = partitions(rows, 2, 1)
    assert {1, 2, 3} <= {row["id"] for row in first}
    assert len(partitions(rows[1:], 2, 1)) == 1


def test_more_replicas_than_rows_get_nothing():
    assert len(partitions(rows_of([[1], [2]]), 8, 1)) == 2


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({"max_new_tokens": 7}, 7),
        ({"max_new_tokens": 10**9}, 4096),
        ({"max_new_tokens": -1}, 128),
        ({"max_new_tokens": "many"}, 128),
        ({"temperature": 0}, 128),
        (None, 128),
    ],
)
def test_expected_output(params, tokens):
    assert expected_output({"sampling_params": params}) == tokens


def test_rows_survive_packing():
    rows = rows_of([[1, 2], [3]])
    before = [{**row, "tokenized_prompt": row["tokenized_prompt"].tolist()} for row in rows]
    after = unpack([{"partition": pack(rows[:1])}, {"partition": pack(rows[1:])}])
    assert [
        {**row, "tokenized_prompt": row["tokenized_prompt"].tolist()} for row in after
    ] == before


# A row and its replica


def test_a_request_has_what_the_row_says():
    stop = np.array(["a", "b"], object)
    row = {"tokenized_prompt": np.array([5, 6]), "sampling_params": {"stop": stop, "n": None}}
    body = json.loads(line_of(row))["request"]
    assert body == {"input_ids": [5, 6], "sampling_params": {"stop": ["a", "b"]}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "no tokenized_prompt; leave tokenize_stage on"),
        ({"tokenized_prompt": [5], "sampling_params": {"stop": b"\xff"}}, "can't be sent"),
        ({"tokenized_prompt": np.full(MAX_LINE_BYTES, 5)}, f"takes {MAX_LINE_BYTES}"),
    ],
)
def test_what_can_not_be_sent_is_said(row, said):
    with pytest.raises(ValueError, match=said):
        line_of(row)


@pytest.mark.parametrize(
    ("most", "most_bytes", "sizes"), [(9, 99, [5]), (2, 99, [2, 2, 1]), (9, 7, [2, 2, 1])]
)
def test_lists_are_cut_only_beyond_the_limits_of_an_engine(most, most_bytes, sizes):
    lines = [(number, b"abc") for number in range(5)]
    found = [*parts(lines, most, most_bytes)]
    assert [len(part) for part in found] == sizes
    assert [line for part in found for line in part] == lines
    assert [*parts([], most, most_bytes)] == []


def test_answers_and_errors_have_the_same_columns():
    facts = {"prompt_tokens": 2, "cached_tokens": 1, "completion_tokens": 3}
    done = {"text": None, "output_ids": [7, 8, 9], "meta_info": facts}
    stop = {"finish_reason": {"type": "stop"}}
    abort = {"finish_reason": {"type": "abort", "message": "no reason"}}
    replies = [
        Reply(200, done | {"meta_info": facts | stop}),
        Reply(200, done | {"meta_info": facts | abort}),
        Reply(400, {"error": {"message": "too long"}}),
        Reply(500, {"message": "broken"}),
    ]
    rows = rows_of([[1, 2]] * 4)
    outputs = [output_of(row, reply) for row, reply in zip(rows, replies, strict=True)]
    assert len({tuple(output) for output in outputs}) == 1
    assert [output["generated_tokens"] for output in outputs] == [[7, 8, 9], None, None, None]
    assert outputs[0]["num_input_tokens"] - outputs[0]["num_cached_tokens"] == 1
    assert [output[ERROR] for output in outputs] == [
        "",
        "aborted: no reason",
        "status 400: too long",
        "status 500: broken",
    ]


# The configuration


def test_engines_run_with_batchllm():
    assert BatchLLMProcessorConfig(model_source="m").engine_kwargs["batchllm"]
    with pytest.raises(ValidationError, match="take Ray's SGLangEngineProcessorConfig"):
        BatchLLMProcessorConfig(model_source="m", engine_kwargs={"batchllm": False})


@pytest.mark.parametrize("wrong", [{"window": 0}, {"num_gpus": -1}, {"max_concurrent_batches": 0}])
def test_numbers_are_checked(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        BatchLLMProcessorConfig(model_source="m", **wrong)
