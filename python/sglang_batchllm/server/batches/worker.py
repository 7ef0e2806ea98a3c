"""The process that works batches off: ``python -m sglang_batchllm.server.batches.worker``.

Its standard input holds the line of a `Task`, and then nothing until the server is gone: when it
ends, so does this process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from sglang_batchllm.jobs.job import Files, run_job
from sglang_batchllm.jobs.server import Server
from sglang_batchllm.jobs.status import Counts
from sglang_batchllm.server.batches.batch_store import BatchRecord
from sglang_batchllm.server.batches.collect import error_path, output_path
from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.running import RunRecord, Watch
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.task import Task
from sglang_batchllm.server.batches.tending import Tending

LAST_SECONDS = 10
"""What is left for an orderly end when the server is gone."""

NICENESS = 10
"""Reading and planning large files yields to the processes that answer requests."""


def jobs_of(task: Task, directory: Directory) -> RunRecord:
    """Batches become jobs at the server's own address."""

    async def run_record(record: BatchRecord, watch: Watch) -> Counts:
        files = Files(
            inputs=(directory.content(record.input_file_id),),
            output=output_path(directory, record.id),
            errors=error_path(directory, record.id),
        )
        return await run_job(
            files, Server(task.url, task.api_key, task.verify), url=record.endpoint, watch=watch
        )

    return run_record


async def work(task: Task) -> None:
    """Until standard input ends."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_wait_for_end, args=[loop, stop], daemon=True).start()
    directory = Directory(Path(task.directory))
    while (lock := directory.claim("worker")) is None:  # that of a server that has just died
        if stop.is_set():
            return
        await asyncio.sleep(0.1)
    store = Store(directory)
    try:
        await Tending(store, jobs_of(task, directory)).serve(stop)
    finally:
        store.close()
        lock.release()


def _wait_for_end(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    sys.stdin.buffer.read()
    loop.call_soon_threadsafe(stop.set)
    time.sleep(LAST_SECONDS)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's to understand, in a terminal
    os.nice(NICENESS)
    task = Task.from_line(sys.stdin.buffer.readline())
    logging.basicConfig(
        level=task.log_level, format="[%(asctime)s batch worker] %(message)s", stream=sys.stderr
    )
    asyncio.run(work(task))


if __name__ == "__main__":
    main()
