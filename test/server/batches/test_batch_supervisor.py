"""The process that works batches off: when it starts, and what happens when it dies."""

import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from batch_fakes import keep, make_store, ordered, requests
from sglang_batchllm.server.batches import supervisor
from sglang_batchllm.server.batches.collect import output_path
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.supervisor import DEATHS, Phase, Supervisor
from sglang_batchllm.server.batches.task import Task

SECRET = "secret-of-the-server"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "files")


class Beside:
    """A supervisor whose worker is a program that logs a line when it starts."""

    def __init__(self, store: Store, log: Path, program: str):
        self.phase: Phase = "starting"
        self.log = log
        task = Task(str(store.directory.root), "http://127.0.0.1:1", SECRET, True, logging.INFO)
        begin = f"import os, sys\nline = sys.stdin.readline()\nlog = open({str(log)!r}, 'a')\n"
        begin += "print(os.getpid(), file=log, flush=True)\n"
        command = (sys.executable, "-c", begin + textwrap.dedent(program))
        self.supervisor = Supervisor(store, task, lambda: self.phase, command)
        self.supervisor.start()

    def started(self) -> list[int]:
        """Process ids of all workers that there were."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def end(self) -> None:
        self.phase = "stopping"
        self.supervisor.wake()
        self.supervisor.join(20)
        assert not any(psutil.pid_exists(pid) for pid in self.started())


def wait_until(is_so: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


WAITS = "sys.stdin.read()\nprint(line)"


def test_a_worker_starts_with_the_first_batch_and_ends_with_the_server(
    store: Store, tmp_path: Path
):
    beside = Beside(store, tmp_path / "log", WAITS)
    beside.phase = "serving"
    beside.supervisor.wake()
    time.sleep(0.3)
    assert not beside.started()
    ordered(store, requests(1))
    beside.supervisor.wake()
    wait_until(beside.started)
    (pid,) = beside.started()
    words = [*psutil.Process(pid).cmdline(), *psutil.Process(pid).environ().values()]
    assert not any(SECRET in word for word in words)
    beside.end()


def test_what_was_left_is_gone_on_with_once_the_server_is_ready(store: Store, tmp_path: Path):
    ordered(store, requests(1))
    beside = Beside(store, tmp_path / "log", WAITS)
    beside.supervisor.wake()
    time.sleep(0.3)
    assert not beside.started()
    beside.phase = "serving"
    beside.supervisor.wake()
    wait_until(beside.started)
    beside.end()


def test_a_worker_that_dies_is_started_again(store: Store, tmp_path: Path):
    ordered(store, requests(1))
    beside = Beside(store, tmp_path / "log", WAITS)
    beside.phase = "serving"
    wait_until(beside.started)
    os.kill(beside.started()[0], 9)
    wait_until(lambda: len(beside.started()) == 2)
    beside.end()


def test_batches_fail_when_it_dies_too_often(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.02)
    batch, cancelled = ordered(store, requests(2)), ordered(store, requests(2))
    store.batches.cancel(cancelled.id)
    store.directory.run(batch.id).mkdir()
    output_path(store.directory, batch.id).write_bytes(b"{}\n")
    beside = Beside(store, tmp_path / "log", "sys.exit(7)")
    beside.phase = "serving"
    wait_until(lambda: not store.batches.open())
    found = store.batches.get(batch.id)
    assert found.status == "failed" and found.errors is not None
    assert found.errors[0]["message"] == (
        f"the batch worker ended {DEATHS} times in a row, the last time with 7"
    )
    assert store.batches.get(cancelled.id).status == "cancelled"
    assert found.output_file_id is not None  # what was done is not lost
    assert store.directory.content(found.output_file_id).read_bytes() == b"{}\n"
    assert len(beside.started()) == DEATHS
    ordered(store, requests(1))
    wait_until(lambda: len(beside.started()) > DEATHS)  # others get a chance
    beside.end()


def test_a_worker_that_does_not_end_is_ended(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.5)
    ordered(store, requests(1))
    beside = Beside(store, tmp_path / "log", "import time\ntime.sleep(600)")
    beside.phase = "serving"
    wait_until(beside.started)
    beside.end()


def test_expired_files_are_swept(store: Store, tmp_path: Path):
    file = keep(store, b"x", seconds=-1)
    beside = Beside(store, tmp_path / "log", WAITS)
    wait_until(lambda: not store.directory.content(file.id).exists())
    beside.end()


def test_the_worker_itself_ends_with_its_standard_input(store: Store):
    """While another has the directory, and while it works."""
    lock = store.directory.claim("worker")
    task = Task(str(store.directory.root), "http://127.0.0.1:1", None, True, logging.INFO)
    for locked in (True, False):
        if lock is not None and not locked:
            lock.release()
        worker = subprocess.Popen(supervisor.WORKER, stdin=subprocess.PIPE)
        assert worker.stdin is not None
        worker.stdin.write(task.to_line())
        worker.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(3)
        worker.stdin.close()
        assert worker.wait(10) == 0
