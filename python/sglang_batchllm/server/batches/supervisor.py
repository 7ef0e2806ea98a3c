"""The server's thread beside it: the worker process, and what is due from time to time."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from sglang_batchllm.server.batches.collect import collect
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.task import Task

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "sglang_batchllm.server.batches.worker")

DEATHS = 5
"""After so many in a row the batches that are open fail."""

LONG_SECONDS = 600
"""A worker that lived for so long begins a new row."""

PAUSE_SECONDS = 0.5
"""Before a worker is started again; twice as long each further time."""

LOOK_SECONDS = 1.0
SWEEP_SECONDS = 60.0
END_SECONDS = 15.0

Phase = Literal["starting", "serving", "stopping"]
"""Of the server. Once it is stopping, nothing more is sent to it, so that it gets to an end."""


class Supervisor:
    """Has a worker while batches are open: the first starts when there is one."""

    def __init__(
        self,
        store: Store,
        task: Task,
        phase: Callable[[], Phase],
        command: Sequence[str] = WORKER,
    ):
        self._store = store
        self._task = task
        self._phase = phase
        self._command = command
        self._awake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batch-api", daemon=True)
        self._worker: subprocess.Popen[bytes] | None = None
        self._started = self._not_before = self._sweep_at = 0.0  # monotonic seconds
        self._deaths = 0

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is a new batch."""
        self._awake.set()

    def join(self, seconds: float) -> None:
        """Until the server is stopping and the worker is gone. Raises TimeoutError."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError

    def _run(self) -> None:
        while self._phase() != "stopping":
            try:
                self._look()
            except Exception:  # the next look may find things mended
                logger.exception("Looking after the batches failed")
            self._awake.wait(LOOK_SECONDS)
            self._awake.clear()
        self._end_worker()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            self._store.sweep()
        if self._worker is not None and self._worker.poll() is not None:
            self._note_death(self._worker.returncode, now)
            self._worker = None
        wanted = self._worker is None and self._phase() == "serving" and now >= self._not_before
        if wanted and self._store.batches.open():
            self._start(now)

    def _start(self, now: float) -> None:
        self._worker = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        self._started = now
        assert self._worker.stdin is not None
        try:
            self._worker.stdin.write(self._task.to_line())
            self._worker.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead; the next look sees that

    def _note_death(self, status: int, now: float) -> None:
        if now - self._started > LONG_SECONDS:
            self._deaths = 0
        self._deaths += 1
        if self._deaths < DEATHS:
            pause = PAUSE_SECONDS * 2 ** (self._deaths - 1)
            self._not_before = now + pause
            logger.warning(
                "The batch worker ended with status %d; it starts again in %g s", status, pause
            )
            return
        self._deaths = 0
        logger.error("The batch worker ended with status %d, as %d before it", status, DEATHS - 1)
        message = f"the batch worker ended {DEATHS} times in a row, the last time with {status}"
        error = {"code": "worker_died", "message": message, "param": None, "line": None}
        for record in self._store.batches.open():
            self._store.batches.decide(record.id, "failed", [error])
            collect(self._store.directory, self._store.batches, record)

    def _end_worker(self) -> None:
        if self._worker is None or self._worker.stdin is None:
            return
        self._worker.stdin.close()
        try:
            self._worker.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
