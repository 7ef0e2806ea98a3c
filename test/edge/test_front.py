"""What of SGLang's answers a hand-over gives back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_batchllm.edge.front import BatchLLMTokenizerManager, Front
from sglang_batchllm.edge.openai import Asked
from sglang_batchllm.wire.lines import Reply

META = {"id": "an id", "finish_reason": {"type": "length", "length": 2}}
WITH_TEXT = {"text": "a text", "output_ids": [1, 2], "meta_info": META}
WITHOUT_TEXT = {"output_ids": [1, 2], "meta_info": META}
"""Of an engine that was started without a tokenizer."""


class Manager:
    """Gives what it is told to, or raises it."""

    def __init__(self, *results: Any):
        self.taking: dict[str, Any] = {}
        self.converting: set[str] = set()
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


class Handler:
    """Makes no request of a chat before it may, and fails then if it has none."""

    def __init__(self, made: GenerateReqInput | None):
        self.made = made
        self.may = asyncio.Event()

    def _validate_request(self, request: Any) -> str:
        return "nothing to convert beside the event loop"

    async def handle_request(self, request: Any, raw_request: Any) -> Any:
        await self.may.wait()
        if self.made is None:
            raise ValueError("no such template")
        manager.generate_request(self.made)  # whose body does not run before it is awaited
        await asyncio.Event().wait()


manager: Any = object.__new__(BatchLLMTokenizerManager)
manager.taking, manager.converting = {}, set()


@pytest.mark.parametrize("fails", [False, True])
def test_a_chat_is_worked_on_until_it_is_a_request_of_generate(fails: bool):
    async def main() -> None:
        front = Front(manager)
        handler = Handler(None if fails else GenerateReqInput(text="a prompt"))
        task = asyncio.create_task(front.answer(Asked({}, handler), "hand-over's", print))
        await asyncio.sleep(0.01)
        assert front.is_preparing()
        handler.may.set()
        await asyncio.sleep(0.01)
        assert not front.is_preparing()
        assert task.done() is fails
        task.cancel()
        await asyncio.wait([task])
        if handler.made is not None:
            assert handler.made.rid == "hand-over's"

    asyncio.run(main())
