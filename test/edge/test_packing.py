"""A list travels field by field, and comes out as it went in."""

import pickle
from array import array
from typing import Any

import pytest
from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_batchllm.edge.packing import PackedList, packed, unpacked

FIELDS = TokenizedGenerateReqInput.__struct_fields__


def request(rid: str, tokens: list[int], **fields: Any) -> TokenizedGenerateReqInput:
    values: dict[str, Any] = {
        **dict.fromkeys(FIELDS),
        "sampling_params": SamplingParams(max_new_tokens=4),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "stream": False,
        "time_stats": APIServerReqTimeStats(),
        "rid": rid,
        "input_ids": array("q", tokens),
    }
    return TokenizedGenerateReqInput(**values | fields)


def travelled(requests: list[TokenizedGenerateReqInput]) -> list[TokenizedGenerateReqInput]:
    message = packed(BatchTokenizedGenerateReqInput(batch=requests))
    assert isinstance(message, PackedList)
    return unpacked(pickle.loads(pickle.dumps(message))).batch


def values_of(request: TokenizedGenerateReqInput) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in FIELDS}
    values["time_stats"] = type(values["time_stats"])
    return values


MIXED = [
    request("a", [1, 2, 3]),
    request("b", [], sampling_params=SamplingParams(max_new_tokens=1, temperature=0.5)),
    request("c", [7], extra_key="other", return_logprob=True, token_ids_logprob=[3, 4]),
]


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(MIXED, id="of mixed requests"),
        pytest.param(MIXED[:1], id="of one request"),
        pytest.param([request("a", []), request("b", [])], id="of empty prompts"),
        pytest.param(
            [request("a", [1 << 31]), request("b", [-(1 << 40), 5])], id="of ids beyond 32 bits"
        ),
        pytest.param([request("a", [1]), request("b", [2], time_stats=None)], id="untimed"),
    ],
)
def test_a_list_comes_out_as_it_went_in(requests: list[TokenizedGenerateReqInput]):
    arrived = travelled(requests)
    assert [*map(values_of, arrived)] == [*map(values_of, requests)]
    assert all(isinstance(one.input_ids, array) for one in arrived)


def test_what_is_equal_travels_once():
    def size(requests: list[TokenizedGenerateReqInput]) -> int:
        return len(pickle.dumps(packed(BatchTokenizedGenerateReqInput(batch=requests))))

    alone, many = size([request("x" * 32, [1] * 50)]), size([request("x" * 32, [1] * 50)] * 101)
    assert many - alone < 100 * (50 * 4 + 32)


def test_each_request_gets_parameters_of_its_own():
    first, second = travelled([request("a", [1]), request("b", [2])])
    first.sampling_params.max_new_tokens = 9
    assert second.sampling_params.max_new_tokens == 4
    assert first.time_stats is not second.time_stats


def test_values_that_are_equal_but_of_different_types_stay_apart():
    flags = [request("a", [1], return_logprob=True), request("b", [2], return_logprob=1)]
    assert [one.return_logprob for one in travelled(flags)] == [True, 1]
    assert travelled(flags)[0].return_logprob is True


@pytest.mark.parametrize("fields", [{"mm_inputs": {"pixels": 1}}, {"input_ids": None}])
def test_prompts_that_are_more_than_token_ids_travel_as_sglang_sends_them(fields: dict[str, Any]):
    other = request("b", [2])
    for name, value in fields.items():
        setattr(other, name, value)
    batch = BatchTokenizedGenerateReqInput(batch=[request("a", [1]), other])
    assert packed(batch) is batch
