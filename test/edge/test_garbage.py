"""What many requests leave behind is let go of a few at a time, and what lives before them is not
looked at."""

import asyncio
import weakref
from itertools import pairwise
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_batchllm.edge.garbage import FREED_AT_ONCE, Leftovers
from sglang_batchllm.edge.lists import ListIntake

MANY = 3 * FREED_AT_ONCE + 1


class Request:
    pass


def left_over() -> tuple[Leftovers, "weakref.WeakSet[Request]"]:
    """And those that are not freed yet."""
    leftovers, requests = Leftovers(), [Request() for _ in range(MANY)]
    leftovers.add(requests)
    return leftovers, weakref.WeakSet(requests)


def test_a_step_frees_some_of_them():
    leftovers, alive = left_over()
    for step in (1, 2, 3):
        leftovers.free_some()
        assert len(alive) == MANY - step * FREED_AT_ONCE
    assert leftovers
    leftovers.free_some()
    assert not leftovers and not alive
    leftovers.free_some()


def test_the_event_loop_turns_while_they_are_freed():
    leftovers, alive = left_over()

    async def main() -> list[int]:
        freeing, seen = asyncio.create_task(leftovers.free()), []
        while not freeing.done():
            seen.append(len(alive))
            await asyncio.sleep(0)
        return seen

    seen = asyncio.run(main())
    assert all(before - after <= FREED_AT_ONCE for before, after in pairwise(seen))
    assert seen[0] == MANY and not alive


def test_the_first_request_has_what_lives_set_aside_and_no_other(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    async def freeze(self: Any) -> None:
        done.append("freeze")

    async def tokenize(self: Any, obj: Any) -> None:
        done.append("tokenize")

    stock = next(c for c in ListIntake.__mro__[1:] if "_tokenize_one_request" in vars(c))
    monkeypatch.setattr(stock, "freeze_gc", freeze)
    monkeypatch.setattr(stock, "_tokenize_one_request", tokenize)
    front: Any = object.__new__(ListIntake)
    front._expects_many = False
    request = GenerateReqInput(input_ids=[1])
    for _ in range(2):
        asyncio.run(front._tokenize_one_request(request))
    assert done == ["freeze", "tokenize", "tokenize"]
