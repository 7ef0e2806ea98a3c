"""Hand-overs and their registry, with a front end that only pretends."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sglang_batchllm.server import body, handover
from sglang_batchllm.server.body import LineSplitter
from sglang_batchllm.server.errors import RefusedError
from sglang_batchllm.server.registry import Registry
from sglang_batchllm.wire.lines import GENERATE, Reply, read_answers, request_line
from sglang_batchllm.wire.request_ids import RequestId, new_batch_id


class Prepared:
    def __init__(self, rid: str, text: str):
        self.rid = rid
        self.text = text


class Front:
    """Answers each request with its text once it was sent. "late" ones are prepared only when all
    that was sent is answered, as behind a weight update; "slow" ones are worked on one after
    the other. sent: the texts of each message."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.turns: list[dict[str, tuple[str, int]]] = []
        self.yielded: list[bool] = []
        self.released: list[dict[int, bool] | None] = []
        self.cancelled: list[str] = []
        self.answered = asyncio.Event()
        self.preparing = 0
        self._sent = asyncio.Event()

    def read(self, url: str, body: object) -> Any:
        if url != GENERATE or not isinstance(body, dict) or not isinstance(body.get("text"), str):
            raise ValueError("no text")
        return body

    def untokenized(self, request: Any) -> int:
        return len(request["text"])

    def tokenize(self, requests: Sequence[Any]) -> None:
        pass

    async def answer(self, request: Any, rid: str, take: Callable[[Any], None]) -> Reply:
        text = request["text"]
        try:
            if text == "late":
                await self.answered.wait()
            if text.startswith("slow"):
                self.preparing += 1
                await asyncio.sleep(0.1 * int(text[5:]))
                self.preparing -= 1
            take(Prepared(rid, text))
            while not any(text in message for message in self.sent):
                self._sent.clear()
                await self._sent.wait()
            if text == "endless":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(rid)
            raise
        self.answered.set()
        return Reply(200, {"text": text, "meta_info": {}})

    async def send(self, batch: str, requests: Sequence[Any], turns: dict, yields: bool) -> None:
        self.sent.append([request.text for request in requests])
        self.turns.append(turns)
        self.yielded.append(yields)
        self._sent.set()

    def release(self, batch: str, programs: dict[int, bool] | None = None) -> None:
        self.released.append(programs)

    def is_preparing(self) -> bool:
        return self.preparing > 0

    def settle(self) -> None:
        pass

    def tidy(self) -> None:
        pass

    async def internal_states(self) -> list[dict[str, Any]]:
        return []


def line(text: str, program: int = 0, more: bool = False) -> bytes:
    return request_line(program, json.dumps({"text": text}).encode(), more)


async def answers_of(open_handover: Any) -> dict[int, Any]:
    lines = [each async for chunk in open_handover.answers() for each in chunk.splitlines()]
    found = [answer for answer in read_answers(lines) if answer is not None]
    assert len(found) == len(dict(found))
    return dict(found)


async def run(registry: Registry, data: bytes, chunk: int = 1 << 20) -> dict[int, Any]:
    open_handover = registry.begin(new_batch_id())
    try:
        for start in range(0, len(data), chunk):
            await open_handover.add(data[start : start + chunk])
        await open_handover.finish()
        return await answers_of(open_handover)
    finally:
        await open_handover.abandon()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_bad_line_fails_alone(chunk: int):
    bad = [
        b"null",
        b"[]",
        b'"x"',
        b"no json",
        b"{}",
        b'{"program":-1,"more":false,"request":{"text":"a"}}',
        b'{"program":0.5,"more":false,"request":{"text":"a"}}',
        b'{"program":0,"more":"no","request":{"text":"a"}}',
        b'{"program":0,"more":false}',
        b'{"program":0,"more":false,"request":null}',
        b'{"program":0,"more":false,"request":[]}',
        b'{"program":0,"more":false,"request":{"text":5}}',
        b"\xff\xfe",
        b"[" * 5000,
    ]
    data = line("first") + b"\n".join(bad) + b"\n\r\n\n" + line("last").rstrip()

    async def main() -> None:
        front = Front()
        answers = await run(Registry(front), data, chunk)
        assert sorted(answers) == list(range(len(bad) + 2))
        statuses = [answers[index].status_code for index in sorted(answers)]
        assert statuses == [200, *[400] * len(bad), 200]
        assert all(answers[i + 1].content["error"]["message"] for i in range(len(bad)))
        assert front.sent == [["first", "last"]]

    asyncio.run(main())


def test_what_is_ready_does_not_wait_for_what_is_kept():
    """A weight update waits for the requests that run; they must not wait for the others."""

    async def main() -> None:
        front = Front()
        data = line("a", 0, True) + line("late", 1) + line("b", 2)
        open_handover = (registry := Registry(front)).begin(batch := new_batch_id())
        await open_handover.add(data)
        answers = asyncio.create_task(answers_of(open_handover))
        await asyncio.wait_for(front.answered.wait(), 10)
        registry.end_programs(batch, {0: False})
        assert sorted(await asyncio.wait_for(answers, 10)) == [0, 1, 2]
        assert front.sent == [["a", "b"], ["late"]]
        assert [[*turns.values()] for turns in front.turns] == [
            [("first", 0), ("once", 2)],
            [("once", 1)],
        ]
        await open_handover.abandon()

    asyncio.run(main())


def test_slow_work_does_not_cut_a_list(monkeypatch: pytest.MonkeyPatch):
    """Requests are planned together though each takes longer than others may be quiet."""
    monkeypatch.setattr(handover, "QUIET_SECONDS", 0.02)

    async def main() -> None:
        front = Front()
        texts = [f"slow {i}" for i in range(4)]
        assert len(await run(Registry(front), b"".join(map(line, texts)))) == len(texts)
        assert front.sent == [texts]

    asyncio.run(main())


@pytest.mark.parametrize("yields", [False, True])
def test_the_scheduler_is_told_whether_a_list_yields(yields: bool):
    async def main() -> None:
        front = Front()
        open_handover = Registry(front).begin(new_batch_id(), yields)
        await open_handover.add(line("a") + line("b"))
        await open_handover.finish()
        assert len(await answers_of(open_handover)) == 2
        await open_handover.abandon()
        assert front.yielded == [yields]

    asyncio.run(main())


def test_heartbeats_begin_with_the_response(monkeypatch: pytest.MonkeyPatch):
    """Not only once all is tokenized and sent."""
    monkeypatch.setattr(handover, "HEARTBEAT_SECONDS", 0.01)

    async def main() -> None:
        front = Front()
        open_handover = Registry(front).begin(new_batch_id())
        await open_handover.add(line("slow 2"))
        beats = 0
        async for chunk in open_handover.answers():
            if not front.sent:
                assert chunk == b"\n"
                beats += 1
        assert beats > 3
        await open_handover.abandon()

    asyncio.run(main())


def test_a_batch_id_is_checked_and_used_once_at_a_time():
    async def main() -> None:
        registry = Registry(Front())
        for wrong in ("", "x", new_batch_id().upper(), new_batch_id() + "0", "0" * 1_000_000):
            with pytest.raises(RefusedError) as refused:
                registry.begin(wrong)
            assert refused.value.reply.status_code == 400
            assert len(refused.value.reply.text) < 200
        open_handover = registry.begin(batch := new_batch_id())
        with pytest.raises(RefusedError) as refused:
            registry.begin(batch)
        assert refused.value.reply.status_code == 409
        await open_handover.abandon()
        second = registry.begin(batch)
        await open_handover.abandon()  # once more: of no effect on the second
        assert registry.begin(new_batch_id()) is not second
        with pytest.raises(RefusedError):
            registry.begin(batch)

    asyncio.run(main())


def test_only_programs_that_go_on_have_later_turns():
    async def main() -> None:
        front = Front()
        registry = Registry(front)
        batch = new_batch_id()
        later = [str(RequestId("later", batch, program, 0)) for program in range(3)]
        assert [registry.later_turn(rid) for rid in later] == [None] * 3  # not open
        open_handover = registry.begin(batch)
        await open_handover.add(line("a", 0, more=True) + line("b", 1) + line("c", 2, more=True))
        first = str(RequestId("first", batch, 0, 0))
        other = str(RequestId("later", new_batch_id(), 0, 0))
        for rid in (first, other, later[1], later[0] + "#out=3", "", None):
            assert registry.later_turn(rid) is None
        asked = registry.later_turn(later[0])
        assert asked is not None and (asked.batch, asked.program) == (batch, 0)
        registry.end_programs(batch, {0: True, 1: True, 7: False})
        assert front.released == [{0: True}]  # programs of the batch that went on, no others
        assert registry.later_turn(later[0]) is None and registry.later_turn(later[2]) is not None
        await open_handover.abandon()
        assert registry.later_turn(later[2]) is None
        with pytest.raises(RefusedError) as refused:
            registry.end_programs(batch, {2: True})
        assert refused.value.reply.status_code == 404

    asyncio.run(main())


def test_what_is_abandoned_is_cancelled_and_released():
    async def main() -> None:
        front = Front()
        open_handover = Registry(front).begin(new_batch_id())
        await open_handover.add(line("a") + line("endless") * 600 + line("late"))
        answers = open_handover.answers()
        seen = b""
        while not seen.strip():
            seen = await anext(answers)
        await open_handover.abandon()
        assert len(front.cancelled) == 600
        assert front.released == [None]

    asyncio.run(main())


def test_the_limits_are_for_all_hand_overs_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(body, "MAX_REQUESTS", 5)

    async def main() -> None:
        registry = Registry(Front(), body.Room(requests=5))
        for _ in range(3):  # what is refused leaves its room to others
            with pytest.raises(RefusedError) as refused:
                await run(registry, line("a") * 6)
            assert refused.value.reply.status_code == 413
        waiting = registry.begin(new_batch_id())
        await waiting.add(line("a") * 3)
        with pytest.raises(RefusedError) as refused:
            await run(registry, line("a") * 3)
        assert refused.value.reply.status_code == 503
        await waiting.abandon()
        assert len(await run(registry, line("a") * 5)) == 5

    asyncio.run(main())


def test_a_long_line_is_joined_once_and_refused_when_too_long(monkeypatch: pytest.MonkeyPatch):
    lines = LineSplitter()
    chunks = body.MAX_LINE_BYTES // 64
    for _ in range(chunks):
        assert [*lines.feed(b"x" * 64)] == []
    assert [len(each) for each in lines.feed(b"\n")] == [chunks * 64]
    with pytest.raises(RefusedError) as refused:
        for _ in range(chunks + 1):
            assert [*lines.feed(b"x" * 64)] == []
    assert refused.value.reply.status_code == 413
