"""Ids of a list's requests, which are made before SGLang would make them."""

from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_batchllm.edge.list_states import new_ids


def ids_of(**fields: Any) -> tuple[list[str] | None, Any]:
    """Ours, and SGLang's own after it has been given them."""
    request = GenerateReqInput(**fields)
    ours = request.rid = new_ids(request)
    request.normalize_batch_and_arguments()
    return ours, request.rid


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"input_ids": [[1, 2], [1, 2], [3]]}, id="token ids"),
        pytest.param({"text": ["a", "b", "c"], "sampling_params": {"n": 1}}, id="texts"),
        pytest.param(
            {"text": ["a", "b", "c"], "sampling_params": [{}, {}, {}]}, id="params of each"
        ),
    ],
)
def test_each_prompt_of_a_list_has_an_id(fields: dict[str, Any]):
    ours, taken = ids_of(**fields)
    assert ours is not None
    assert taken == ours
    assert len({*ours}) == 3
    assert all(len(rid) == 32 and int(rid, 16) >= 0 for rid in ours)
    assert not {*ours} & {*(ids_of(**fields)[0] or [])}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"input_ids": [1, 2, 3]}, id="token ids of one"),
        pytest.param({"text": "abc"}, id="one text"),
        pytest.param({"text": ["a", "b"], "sampling_params": {"n": 2}}, id="samples"),
        pytest.param({"text": ["a", "b"], "sampling_params": [{"n": 2}] * 2}, id="samples of each"),
        pytest.param({"input_embeds": [[[0.5]], [[0.5]]]}, id="embeddings"),
    ],
)
def test_sglang_names_all_others(fields: dict[str, Any]):
    ours, taken = ids_of(**fields)
    assert ours is None
    assert taken
