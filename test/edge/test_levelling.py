"""What is held back of lists goes to who runs out of work, and always goes."""

import asyncio
import time
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_batchllm.edge import levelling, replicas
from sglang_batchllm.edge.levelling import Levelling
from sglang_batchllm.edge.messages import NameTurns
from sglang_batchllm.edge.packing import PackedList
from sglang_batchllm.edge.replicas import Replicas

COUNT = 64


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "HOLD_FROM", 16)
    monkeypatch.setattr(replicas, "LEAST_PIECE", 4)
    monkeypatch.setattr(levelling, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(levelling, "SURE_SECONDS", 0.01)


class Front:
    """A front end with two replicas, and what it has sent to each. busy: those that have enough
    that waits. answered: requests that are."""

    def __init__(self, loads: Callable[[], list[Any]] | None = None):
        self.busy: set[int] = set()
        self.answered: set[str] = set()
        self.sent: list[tuple[int, list[str]]] = []
        self.told: list[NameTurns] = []
        self.replicas = Replicas(2, 1, lambda rid: rid not in self.answered)
        self.levelling = Levelling(self.replicas, self.send, loads or self.loads)

    def loads(self) -> list[Any]:
        return [
            SimpleNamespace(
                dp_rank=replica,
                timestamp=time.time() + 1,
                num_running_reqs=8,
                num_waiting_reqs=8 if replica in self.busy else 0,
            )
            for replica in (0, 1)
        ]

    def send(self, message: Any) -> None:
        if isinstance(message, NameTurns):
            self.told.append(message)
        else:
            assert message.common["routed_dp_rank"] == message.shard.replica
            self.sent.append((message.shard.replica, message.columns["rid"]))

    def take(self, turns: dict[str, tuple[str, int]] | None = None) -> None:
        """A list of requests that share nothing."""
        requests = [request(number) for number in range(COUNT)]
        self.replicas.spread_now(requests)
        if turns is not None:
            self.told += self.replicas.turns("batch", turns, False, requests)
        for mine, shard, held in self.replicas.shards(requests):
            assert shard is not None
            rids = [one.rid for one in mine]
            message = PackedList(
                tokens=b"",
                dtype="int32",
                lengths=[],
                common={"routed_dp_rank": shard.replica},
                columns={"rid": rids},
                shard=shard,
            )
            if held:
                self.levelling.hold(message, rids)
            else:
                self.send(message)

    def of(self, replica: int) -> int:
        return sum(len(rids) for number, rids in self.sent if number == replica)


def request(number: int) -> Any:
    return SimpleNamespace(
        rid=f"r{number:02d}",
        input_ids=array("q", [number, 1, 2]),
        mm_inputs=None,
        routed_dp_rank=None,
        sampling_params=SimpleNamespace(max_new_tokens=10),
        extra_key=None,
        lora_id=None,
    )


def run(front: Front, then: Callable[[], None] = lambda: None, **options: Any) -> None:
    async def take() -> None:
        front.take(**options)
        assert front.of(0) == front.of(1) == COUNT // 4
        then()
        for _ in range(500):
            await asyncio.sleep(0.002)
            if sum(map(len, (rids for _, rids in front.sent))) == COUNT:
                break

    asyncio.run(take())
    everything = [rid for _, rids in front.sent for rid in rids]
    assert sorted(everything) == [f"r{number:02d}" for number in range(COUNT)]
    assert not front.replicas.held().any()


def test_each_gets_its_own_while_all_run_alike():
    front = Front()
    run(front)
    assert front.of(0) == front.of(1)
    assert len(front.sent) > 6


def test_who_has_enough_leaves_its_own_to_the_other():
    front = Front()
    front.busy.add(0)
    run(front)
    assert front.of(0) == COUNT // 4
    assert front.of(1) == COUNT * 3 // 4


def test_a_replica_that_says_nothing_gets_more_once_it_has_answered():
    front = Front(loads=list)
    run(front, lambda: front.answered.update(f"r{number:02d}" for number in range(COUNT)))


def test_where_nothing_is_known_all_is_sent():
    def fail() -> list[Any]:
        raise OSError("no snapshots")

    run(Front(loads=fail))


@pytest.mark.parametrize("rids", [None, ["r"]])
def test_what_is_aborted_is_sent_first(rids):
    front = Front()
    front.busy |= {0, 1}
    run(front, lambda: front.levelling.let_go(rids, whole=False))


def test_only_what_holds_an_aborted_request_is_sent():
    front = Front()
    front.busy |= {0, 1}

    async def take() -> None:
        front.take()
        sent = len(front.sent)
        held = front.levelling._held[0][1]
        front.levelling.let_go([sorted(held.rids)[0], "unknown"])
        assert len(front.sent) == sent + 1
        assert {*front.sent[-1][1]} == held.rids

    asyncio.run(take())


def test_programs_are_named_where_they_run():
    front = Front()
    front.busy.add(0)
    turns = {f"r{number:02d}": ("first", number) for number in range(COUNT)}
    run(front, turns=turns)
    named = {rid: message.replica for message in front.told for rid in message.turns}
    ran = {rid: replica for replica, rids in front.sent for rid in rids}
    assert named == ran
    homes = {f"r{number:02d}": front.replicas.home("batch", number) for number in range(COUNT)}
    assert homes == ran
    front.replicas.forget("batch")
    assert front.replicas.home("batch", 0) is None
