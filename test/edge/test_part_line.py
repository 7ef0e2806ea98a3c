"""In which order a scheduler takes in the parts of long lists, and what comes beside them."""

from typing import Any

import pytest
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedGenerateReqInput,
    FlushCacheReqInput,
    GetInternalStateReq,
)

from sglang_batchllm.edge import part_line
from sglang_batchllm.edge.messages import AbortList, NameTurns
from sglang_batchllm.edge.packing import PackedList, end_of_list, packed
from sglang_batchllm.edge.part_line import MANY, PartLine
from sglang_batchllm.policy.parts import Part
from test_packing import request

LONE = request("lone", [1])
AT_ONCE = 2
AT_ONCE_OF_SMALL = 16
"""Parts of `parts`."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_line, "BESIDE_OTHERS", 2)
    monkeypatch.setattr(part_line, "AT_ONCE", 2 * AT_ONCE)
    monkeypatch.setattr(part_line, "AT_ONCE_OF_SMALL", 2 * AT_ONCE_OF_SMALL)


def part(*rids: str, last: bool = False) -> PackedList:
    batch = BatchTokenizedGenerateReqInput(batch=[request(rid, [1, 2]) for rid in rids])
    message = packed(batch, Part("list", last))
    assert isinstance(message, PackedList)
    return message


def parts(count: int) -> list[PackedList]:
    return [part(f"{index}a", f"{index}b", last=index == count - 1) for index in range(count)]


def order(line: PartLine, received: list[Any], others: bool = False) -> list[Any]:
    return line.order(received, lambda: others)


def test_alone_a_list_is_taken_in_by_many_parts():
    line, list_ = PartLine(), parts(AT_ONCE + 1)
    assert order(line, list_) == list_[:AT_ONCE]
    assert order(line, []) == list_[AT_ONCE:]
    assert not line


def test_where_steps_begin_many_requests_the_rest_is_soon_taken_in():
    line, list_ = PartLine(), parts(AT_ONCE_OF_SMALL + 1 + AT_ONCE)
    line.step_requests = MANY
    assert order(line, list_) == list_[:AT_ONCE_OF_SMALL]
    line.step_requests = MANY - 1
    assert order(line, [], others=True) == list_[AT_ONCE_OF_SMALL : AT_ONCE_OF_SMALL + 1]
    assert order(line, []) == list_[AT_ONCE_OF_SMALL + 1 :]


def test_parts_are_counted_by_their_requests():
    list_ = [
        part(f"{size}", *[f"{size}-{index}" for index in range(1, size)]) for size in (1, 2, 2, 5)
    ]
    line = PartLine()
    assert order(line, list_) == list_[:2]
    assert order(line, []) == list_[2:3]
    assert order(line, []) == list_[3:]


def test_while_others_are_served_a_step_takes_in_one_part():
    line, list_ = PartLine(), parts(3)
    assert order(line, list_, others=True) == list_[:1]
    assert order(line, [], others=True) == list_[1:2]
    assert order(line, []) == list_[2:]


def test_a_request_by_itself_goes_before_the_parts_that_wait():
    line, list_ = PartLine(), parts(3)
    assert order(line, [*list_, LONE]) == [LONE, list_[0]]
    assert order(line, [LONE]) == [LONE, list_[1]]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(NameTurns(batch="other", turns={}), id="another list is announced"),
        pytest.param(GetInternalStateReq(), id="somebody asks for the report"),
        pytest.param(AbortReq(rid="lone"), id="a request by itself ends"),
    ],
)
def test_what_is_not_of_the_list_waits_for_none_of_its_parts(message: Any):
    line, list_ = PartLine(), parts(3)
    assert order(line, [*list_, message], others=True) == [message, list_[0]]


def test_another_list_comes_before_the_parts_that_wait():
    other = packed(BatchTokenizedGenerateReqInput(batch=[request("b", [1]), request("c", [1])]))
    line, list_ = PartLine(), parts(3)
    assert order(line, [*list_, other]) == [other, list_[0]]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(AbortReq(rid="1"), id="one of its requests ends, and by the beginning of ids"),
        pytest.param(AbortReq(abort_all=True), id="all end"),
        pytest.param(FlushCacheReqInput(), id="the cache is flushed"),
    ],
)
def test_all_else_keeps_its_place(message: Any):
    line, list_ = PartLine(), parts(AT_ONCE + 3)
    assert order(line, [*list_[:-1], message, list_[-1]], others=True) == [
        *list_[:-1],
        message,
        list_[-1],
    ]


def test_of_a_list_that_nobody_awaits_nothing_more_is_taken_in():
    line, list_ = PartLine(), parts(4)
    order(line, list_, others=True)  # the first is
    aborts = AbortList(rids=["0a", "0b", "1a", "1b", "2a", "2b", "3a", "3b"], awaited=set())
    aborted, *left = order(line, [aborts], others=True)
    assert aborted is aborts
    assert aborts.rids == ["0a", "0b"]
    assert [one.lengths for one in left] == [[], [], []]
    assert [one.part for one in left] == [one.part for one in list_[1:]]


@pytest.mark.parametrize(
    "aborts",
    [
        pytest.param(AbortList(rids=["1a"], awaited=set()), id="one of a part"),
        pytest.param(AbortList(rids=["1a", "1b"], awaited={"1b"}), id="somebody awaits it"),
    ],
)
def test_what_cannot_be_left_out_is_taken_in_first(aborts: AbortList):
    line, list_ = PartLine(), parts(3)
    rids = [*aborts.rids]
    assert order(line, [*list_, aborts], others=True) == [*list_, aborts]
    assert aborts.rids == rids


def test_a_part_of_one_request_and_an_end_without_any():
    line = PartLine()
    one, end = part("a"), end_of_list("list")
    order(line, [part("0a", "0b"), one], others=True)
    aborts = AbortList(rids=["a"], awaited=set())
    aborted, emptied, ended = order(line, [aborts, end])
    assert aborted.rids == []
    assert emptied.lengths == []
    assert ended is end
