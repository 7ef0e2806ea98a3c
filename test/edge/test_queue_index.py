"""Aborts: found by id, and at a cost that does not grow with what waits."""

import time
from types import SimpleNamespace
from typing import Any

from sglang_batchllm.edge.queue_index import QueueIndex, without


def indexed(*rids: str) -> tuple[QueueIndex, dict[str, Any]]:
    index = QueueIndex()
    requests: dict[str, Any] = {rid: SimpleNamespace(rid=rid) for rid in rids}
    for request in requests.values():
        index.add(request)
    return index, requests


def test_ids_are_found_by_how_they_begin():
    index, requests = indexed("b", "ab", "a", "abc", "c")
    assert index.beginning_with("ab") == [requests["ab"], requests["abc"]]
    assert index.get("a") is requests["a"]
    index.discard(requests["ab"])
    assert index.beginning_with("ab") == [requests["abc"]]
    assert index.get("ab") is None
    index.add(requests["ab"])  # retracted
    assert index.beginning_with("a") == [requests[rid] for rid in ("a", "ab", "abc")]
    assert index.beginning_with("d") == []


def test_few_and_many_leave_the_queue():
    class Request:
        pass

    for leaving in (0, 1, 30):
        queue: list[Any] = [Request() for _ in range(40)]
        kept = queue[leaving:]
        assert without(queue, set(queue[:leaving])) == kept


def test_one_abort_costs_little_among_many():
    index, _ = indexed(*(f"{number:032x}" for number in range(20_000)))
    index.beginning_with("f")
    began = time.perf_counter()
    for number in range(1000):
        (found,) = index.beginning_with(f"{number * 17:032x}")
        index.discard(found)
    assert time.perf_counter() - began < 0.1
