"""What of SGLang's answers a hand-over gives back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_batchllm.edge.front import Front
from sglang_batchllm.wire.lines import Reply

META = {"id": "an id", "finish_reason": {"type": "length", "length": 2}}
WITH_TEXT = {"text": "a text", "output_ids": [1, 2], "meta_info": META}
WITHOUT_TEXT = {"output_ids": [1, 2], "meta_info": META}
"""Of an engine that was started without a tokenizer."""


class Manager:
    """Gives what it is told to, or raises it."""

    def __init__(self, *results: Any):
        self.taking: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._results = results

    async def generate_request(self, request: GenerateReqInput) -> AsyncIterator[Any]:
        self.asked.append((str(request.rid), {**self.taking}))
        for result in self._results:
            if isinstance(result, Exception):
                raise result
            yield result


def answer(manager: Any) -> Reply:
    request = GenerateReqInput(text="a prompt")
    return asyncio.run(Front(manager).answer(request, "hand-over's", print))


@pytest.mark.parametrize(
    ("result", "content"),
    [
        pytest.param(WITH_TEXT, {"text": "a text", "meta_info": META}, id="a text stands for ids"),
        pytest.param(
            WITHOUT_TEXT,
            {"text": None, "meta_info": META, "output_ids": [1, 2]},
            id="ids where there is no text",
        ),
        pytest.param(
            [WITH_TEXT, WITHOUT_TEXT],
            [
                {"text": "a text", "meta_info": META},
                {"text": None, "meta_info": META, "output_ids": [1, 2]},
            ],
            id="samples in their order",
        ),
    ],
)
def test_the_last_result_is_the_answer(result: Any, content: Any):
    assert answer(Manager({"text": "a", "meta_info": {}}, result)) == Reply(200, content)


def test_the_request_has_the_hand_overs_id_and_is_taken_while_it_is_prepared():
    manager = Manager(WITH_TEXT)
    answer(manager)
    assert manager.asked == [("hand-over's", {"hand-over's": print})]
    assert not manager.taking


def test_what_fails_is_not_taken_any_more():
    manager = Manager(ValueError("too long"))
    with pytest.raises(ValueError, match="too long"):
        answer(manager)
    assert not manager.taking
