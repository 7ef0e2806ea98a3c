"""Batches that a server works off while something else is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import aiohttp

from servers import CHAT, ask, encoded
from texts import Body, batch_lines

POLL_SECONDS = 0.25


class Batch(Protocol):
    """One that runs."""

    async def done(self) -> int:
        """How many of its requests have been answered. Raises if one has failed."""
        ...

    async def aborted(self) -> int:
        """Requests that the server has given up before they were answered."""
        ...

    async def leave(self) -> None: ...


class ApiBatch:
    """Of the Batch API."""

    def __init__(self, http: aiohttp.ClientSession, name: str):
        self._http, self._name = http, name

    @classmethod
    async def create(cls, http: aiohttp.ClientSession, bodies: Sequence[Body]) -> ApiBatch:
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", "".join(batch_lines([*bodies])).encode(), filename="batch.jsonl")
        async with http.post("/v1/files", data=form) as response:
            assert response.status == 200, await response.text()
            file = (await response.json())["id"]
        order = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        async with http.post("/v1/batches", json=order) as response:
            assert response.status == 200, await response.text()
            return cls(http, (await response.json())["id"])

    async def done(self) -> int:
        async with self._http.get(f"/v1/batches/{self._name}") as response:
            batch = await response.json()
            assert response.status == 200, batch
        if batch["status"] not in ("validating", "in_progress", "finalizing", "completed"):
            raise RuntimeError(f"the batch is {batch['status']}: {batch['errors']}")
        counts = batch["request_counts"]
        if counts["failed"]:
            raise RuntimeError(f"{counts['failed']} requests of the batch failed")
        return counts["completed"]

    async def aborted(self) -> int:
        async with self._http.get("/batchllm/report") as response:
            return (await response.json())["total"]["aborted"]

    async def leave(self) -> None:
        pass


class ChatBatch:
    """Plain chat requests, some number at a time."""

    def __init__(self, http: aiohttp.ClientSession, bodies: Sequence[Body], at_once: int):
        self._http, self._done = http, 0
        self._turn = asyncio.Semaphore(at_once)
        self._tasks = [asyncio.create_task(self._ask(body)) for body in encoded(bodies)]

    async def _ask(self, body: bytes) -> None:
        async with self._turn:
            await ask(self._http, body)
        self._done += 1

    async def done(self) -> int:
        for task in self._tasks:
            if task.done():
                task.result()
        return self._done

    async def aborted(self) -> int:
        return 0  # it would have raised

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Watch:
    """Looks at a batch all the time, since a busy server may take long to answer that."""

    def __init__(self, batch: Batch):
        self._batch = batch
        self.done = 0
        self.task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            self.done = await self._batch.done()
            await asyncio.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raises what is wrong with the batch."""
        if self.task.done():
            self.task.result()
