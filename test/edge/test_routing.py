"""The process between front end and replicas passes lists on whole, and ends with a replica."""

import multiprocessing
import time
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.utils import TypeBasedDispatcher

from sglang_batchllm.edge import routing
from sglang_batchllm.edge.messages import AbortList, NameTurns
from sglang_batchllm.edge.packing import PackedList
from sglang_batchllm.policy.shards import Shard


def controller(batchllm: bool = True, schedulers: Any = ()) -> SimpleNamespace:
    dispatcher = TypeBasedDispatcher([])
    return SimpleNamespace(
        server_args=SimpleNamespace(batchllm=batchllm),
        workers=["first", "second"],
        scheduler_procs=list(schedulers),
        _request_dispatcher=dispatcher,
    )


def init_dispatcher(of: Any) -> None:
    of._request_dispatcher.add_fallback_fn(lambda message: of.workers.append(message))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    messages: list[tuple[str, Any]] = []
    monkeypatch.setattr(routing, "sock_send", lambda worker, what: messages.append((worker, what)))
    return messages


def packed(replica: int) -> PackedList:
    shard = Shard("list", replica, 0)
    return PackedList(tokens=b"", dtype="int32", lengths=[], common={}, columns={}, shard=shard)


def test_what_is_a_replicas_goes_to_it_alone(sent):
    one = controller()
    prepared: list[bool] = []
    routing.know_lists(lambda: prepared.append(True), init_dispatcher, one)
    assert prepared
    turns = NameTurns(batch="b", turns={}, replica=0)
    messages = [turns, packed(1), AbortList(rids=["a"], awaited=set())]
    for message in messages:
        one._request_dispatcher(message)
    assert sent == [("first", turns), ("second", messages[1])]
    assert one.workers[2:] == [messages[2]], "all others go to everybody"


def test_without_the_flag_nothing_changes(sent):
    one = controller(batchllm=False)
    routing.know_lists(lambda: pytest.fail("prepared"), init_dispatcher, one)
    one._request_dispatcher(packed(1))
    assert not sent
    requests = [SimpleNamespace(routed_dp_rank=1)] * 2
    dispatched: list[Any] = []
    routing.pass_on_list(lambda _, batch: dispatched.append(batch), one, requests)  # type: ignore
    assert dispatched == [requests]


@pytest.mark.parametrize(("ranks", "whole"), [([1, 1], True), ([0, 1], False), ([None], False)])
def test_lists_that_are_not_packed_go_whole_to_one_replica(sent, ranks, whole):
    requests: Any = [SimpleNamespace(routed_dp_rank=rank) for rank in ranks]
    dispatched: list[Any] = []
    routing.pass_on_list(lambda _, batch: dispatched.append(batch), controller(), requests)
    assert sent == ([("second", requests)] if whole else [])
    assert dispatched == ([] if whole else [requests])


def _run_controller(pids: Any) -> None:
    replicas = [multiprocessing.Process(target=time.sleep, args=[100]) for _ in range(2)]
    for replica in replicas:
        replica.daemon = False
        replica.start()
    routing.know_lists(lambda: None, init_dispatcher, controller(schedulers=replicas))
    pids.put([replica.pid for replica in replicas])
    time.sleep(100)


def test_it_ends_when_a_replica_has_died():
    import psutil

    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    process = context.Process(target=_run_controller, args=[pids])
    process.start()
    first, second = map(psutil.Process, pids.get(timeout=60))
    try:
        second.kill()
        process.join(30)
        assert process.exitcode == 1
    finally:
        first.kill()
        process.kill()
