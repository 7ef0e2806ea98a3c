"""Servers for jobs that are made up, in a thread: their answers say what they were asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sglang_batchllm.jobs.hosts import Host
from sglang_batchllm.jobs.job import Files, Job
from sglang_batchllm.jobs.reading import Reading
from sglang_batchllm.jobs.rows import Rules
from sglang_batchllm.jobs.server import About, Server
from sglang_batchllm.jobs.status import Status
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS, answer_line
from sglang_batchllm.wire.paths import REPORT_PATH, RUN_PATH

MODEL = "pretended"
IDENTITY = {"name": MODEL, "files": None}


@dataclass
class Script:
    """What servers do, all that one host starts.

    ours: whether they run with ``--batchllm``, and then how many requests at a time.
    killers: prompts that kill a server when their turn comes.
    deaths: by server, after how many answers it dies; the last ones live.
    replies: by prompt, what it gets before its answer: a status, "abort", "drop" for a connection
    that breaks off, or "end" for a list that ends too early.
    refusals: lists that are refused with 503 first.
    shuffled: answers of a list come in this order, None for as they stand.
    hold_after: answers after which all others wait for `release`.
    keeps_alive: seconds after which a connection that idles is closed.
    """

    ours: int | None = 64
    models: tuple[str, ...] = (MODEL,)
    api_key: str | None = None
    killers: frozenset[str] = frozenset()
    deaths: list[int] = field(default_factory=list)
    replies: dict[str, list[int | str]] = field(default_factory=dict)
    refusals: int = 0
    shuffled: random.Random | None = None
    hold_after: int | None = None
    keeps_alive: float = 60.0

    # What they saw.
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lists: list[list[str]] = field(default_factory=list)
    answered: int = 0
    starts: int = 0
    yielding: list[bool] = field(default_factory=list)  # by list
    held: threading.Event = field(default_factory=threading.Event)
    _came: threading.Condition = field(default_factory=threading.Condition)

    def release(self) -> None:
        self.hold_after = None

    def note_list(self, prompts: list[str]) -> None:
        with self._came:
            self.lists.append(prompts)
            self._came.notify_all()

    def wait_for_lists(self, count: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.lists) >= count, 10)


class Pretended:
    """A server. Ends with `stop`, or dies as its script says."""

    def __init__(self, script: Script):
        self._script = script
        self._left = script.deaths.pop(0) if script.deaths else None
        self._loop = asyncio.new_event_loop()
        self._dead = False
        self._begun = threading.Event()
        script.starts += 1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(10)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._die)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._check_key])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post(CHAT, self._one)
        app.router.add_post(COMPLETIONS, self._one)
        if self._script.ours:
            app.router.add_get(RUN_PATH, self._limits)
            app.router.add_get(REPORT_PATH, self._report)
            app.router.add_post(RUN_PATH + "/{id}", self._list)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=self._script.keeps_alive)
        self._ended = asyncio.Event()
        await runner.setup()
        assert runner.server is not None
        self._connections = runner.server
        self._listening = await self._loop.create_server(runner.server, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"
        self._begun.set()
        await self._ended.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _die(self) -> None:
        """Whoever is connected finds the connection reset."""
        self._dead = True
        self._listening.close()
        for connection in self._connections.connections:
            if connection.transport is not None:
                connection.transport.abort()
        self._ended.set()

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        key = self._script.api_key
        given = request.headers.get("Authorization")
        if key is None or request.path == "/health" or given == f"Bearer {key}":
            return await handler(request)
        return web.json_response({"error": {"message": "Unauthorized"}}, status=401)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self._script.models]})

    async def _limits(self, request: web.Request) -> web.Response:
        return web.json_response({"max_running_requests": self._script.ours})

    async def _report(self, request: web.Request) -> web.Response:
        answered = self._script.answered
        return web.json_response({"total": {"computed_tokens": answered, "tokens_saved": 0}})

    async def _one(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._script.asked[prompt_of(body)] += 1
        self._script.bodies.append(body)
        status, content = await self._reply(request, body)
        return web.json_response(content, status=status)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        script = self._script
        bodies = [json.loads(line)["request"] for line in (await request.read()).splitlines()]
        if script.refusals:
            script.refusals -= 1
            return web.json_response({"error": {"message": "too many"}}, status=503)
        prompts = [prompt_of(body) for body in bodies]
        script.asked.update(prompts)
        script.bodies += bodies
        script.yielding.append(request.query.get("yields") == "true")
        script.note_list(prompts)
        response = web.StreamResponse()
        await response.prepare(request)
        places = list(range(len(bodies)))
        if script.shuffled is not None:
            script.shuffled.shuffle(places)
        for place in places:
            await response.write(b"\n")  # a heartbeat
            status, content = await self._reply(request, bodies[place])
            if status == 0:
                break
            await response.write(answer_line(place, status, content))
        return response

    async def _reply(self, request: web.Request, body: dict[str, Any]) -> tuple[int, dict]:
        script, prompt = self._script, prompt_of(body)
        while script.hold_after is not None and script.answered >= script.hold_after:
            script.held.set()
            await asyncio.sleep(0.01)
        if self._left == 0 or prompt in script.killers:
            self._die()
        if self._dead:
            raise asyncio.CancelledError
        if self._left is not None:
            self._left -= 1
        reply = script.replies.get(prompt)
        told = reply.pop(0) if reply else 200
        if told == "drop":
            assert request.transport is not None
            request.transport.abort()
            raise asyncio.CancelledError
        if told == "end":
            return 0, {}
        script.answered += 1
        if isinstance(told, int) and told != 200:
            return told, {"error": {"message": f"status {told}"}}
        return 200, answer_to(body, "abort" if told == "abort" else "stop")


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def answer_to(body: dict[str, Any], reason: str = "stop") -> dict[str, Any]:
    """In SGLang's form."""
    text = f"<{prompt_of(body)}>"
    choice = {"message": {"content": text}} if "messages" in body else {"text": text}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"id": "a", "choices": [{**choice, "finish_reason": reason}], "usage": usage}


class Pretending(Host):
    """Starts servers of a script, each when the one before is lost."""

    def __init__(self, script: Script):
        self.script = script
        self._pretended: Pretended | None = None
        self._server: Server | None = None

    async def start(self) -> tuple[Server, About]:
        self._pretended = await asyncio.to_thread(Pretended, self.script)
        self._server = Server(self._pretended.url, self.script.api_key)
        await self._server.open()
        return self._server, await self._server.about()

    async def again(self) -> tuple[Server, About]:
        await self.stop()
        return await self.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
        if self._pretended is not None:
            await asyncio.to_thread(self._pretended.stop)
        self._server = self._pretended = None


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Pretended]:
    """A server that somebody else runs."""
    pretended = Pretended(script)
    try:
        yield pretended
    finally:
        pretended.stop()


def request(custom_id: str, prompt: str | None = None, url: str = CHAT, **body: Any) -> bytes:
    """A line of a batch file. prompt: the custom_id if None."""
    text = custom_id if prompt is None else prompt
    messages = [{"role": "user", "content": text}]
    body = {"model": MODEL, **({"messages": messages} if url == CHAT else {"prompt": text}), **body}
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return json.dumps(line).encode() + b"\n"


def requests(count: int, url: str = CHAT) -> bytes:
    """r0, r1 and so on, some of which share the beginning of their prompts."""
    return b"".join(request(f"r{i}", f"topic {i % 7}: question {i}", url) for i in range(count))


def prompt_number(i: int) -> str:
    """Of the i-th of `requests`."""
    return f"topic {i % 7}: question {i}"


def job_of(files: Files, host: Host, model: dict[str, Any] | None = IDENTITY, **rules: Any) -> Job:
    rules = {"models": [MODEL], **rules} if model is not None else rules
    return Job(files, host, Reading(Rules(**rules)), model)


def run(files: Files, script: Script, **options: Any) -> Status:
    return asyncio.run(job_of(files, Pretending(script), **options).run())


def records_in(path: Path) -> list[dict[str, Any]]:
    """Every line is one."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def answers_in(path: Path) -> dict[str, str | None]:
    """The text by custom_id, None where the row failed; each has one record."""
    records = records_in(path)
    found: dict[str, str | None] = {}
    for record in records:
        assert (record["response"] is None) != (record["error"] is None)
        response = record["response"]
        ok = response is not None and response["status_code"] == 200
        choice = response["body"]["choices"][0] if ok else {}
        text = choice["message"]["content"] if "message" in choice else choice.get("text")
        found[record["custom_id"]] = text
    assert len(found) == len(records), "two records of one row"
    return found


def expected_answers(count: int) -> dict[str, str | None]:
    return {f"r{i}": f"<{prompt_number(i)}>" for i in range(count)}


KINDS = pytest.mark.parametrize("ours", [None, 8])
"""Of server: with lists, and without."""


def files_of(folder: Path, count: int, url: str = CHAT) -> Files:
    path = folder / "in.jsonl"
    path.write_bytes(requests(count, url))
    return Files((path,), folder / "out.jsonl")


def cancelled(files: Files, script: Script) -> Status:
    """Of a job that is cancelled once its server holds its answers back."""

    async def main() -> Status:
        job = job_of(files, Pretending(script))
        running = asyncio.create_task(job.run())
        assert await asyncio.to_thread(script.held.wait, 10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return job.status

    return asyncio.run(main())
