"""The routes of the batch API behind a real HTTP server, without an engine."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import uvicorn
from fastapi import FastAPI

from batch_fakes import FakeJobs
from sglang_batchllm.server.batches.batch_routes import add_batch_routes
from sglang_batchllm.server.batches.file_routes import add_file_routes
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.tending import Tending


def make_app(store: Store) -> FastAPI:
    app = FastAPI()
    add_file_routes(app, store)
    add_batch_routes(app, store, lambda: None)

    async def ping() -> float:
        return time.monotonic()

    app.add_api_route("/ping", ping)
    return app


@dataclass
class Served:
    """jobs: what the worker does, which is a thread here."""

    store: Store
    url: str
    jobs: FakeJobs

    def client(self, **options: object) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)  # type: ignore[arg-type]


@contextmanager
def serving(store: Store) -> Iterator[Served]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(store), log_level="warning"))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        jobs = FakeJobs(store)
        end = threading.Event()
        worker = threading.Thread(target=lambda: asyncio.run(_work(store, jobs, end)))
        worker.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Served(store, f"http://127.0.0.1:{listener.getsockname()[1]}", jobs)
        finally:
            server.should_exit = True
            end.set()
            thread.join(20)
            worker.join(20)


async def _work(store: Store, jobs: FakeJobs, end: threading.Event) -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(Tending(store, jobs).serve(stop))
    await asyncio.to_thread(end.wait)
    stop.set()
    await serving
