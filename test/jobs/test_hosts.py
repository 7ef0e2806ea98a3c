"""Engines that are started for a job, with commands that only pretend: none outlives its job."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.hosts import Engine

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({pids!r} + ".new", "w") as file:
    print(os.getpid(), child.pid, file=file)
os.rename({pids!r} + ".new", {pids!r})
time.sleep(600)
"""
"""Does not end when asked to, and has a process of its own."""

RUNNER = """
import asyncio, sys
from pathlib import Path
from sglang_batchllm.jobs.hosts import Engine
asyncio.run(Engine([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2])).start())
"""


@pytest.fixture
def stubborn(tmp_path: Path) -> tuple[str, Path]:
    """A program, and where it says who its processes are."""
    pids = tmp_path / "pids"
    return STUBBORN.format(pids=str(pids)), pids


async def processes(pids: Path) -> list[psutil.Process]:
    async with asyncio.timeout(20):
        while not pids.exists():
            await asyncio.sleep(0.01)
    return [psutil.Process(int(pid)) for pid in pids.read_text().split()]


def lives(process: psutil.Process) -> bool:
    """Whether it does anything; what has ended may wait for a slow init to take note of it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_end(running: list[psutil.Process], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(lives, running)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("raise ValueError('no such model')", "ValueError: no such model"),
        ("print('INFO'); raise SystemExit('error: bad flag')", "error: bad flag"),
        (
            "import sys; print('CUDA out of memory', flush=True); print('bye'); sys.exit(1)",
            "CUDA out of memory",
        ),
        ("print('only this')", "only this"),
        ("pass", "it said nothing"),
    ],
)
def test_an_engine_that_does_not_start_says_why(tmp_path: Path, program: str, told: str):
    log = tmp_path / "log"
    engine = Engine([sys.executable, "-c", program], log)

    async def main() -> None:
        try:
            await engine.start()
        finally:
            await engine.stop()

    with pytest.raises(JobError) as caught:
        asyncio.run(main())
    assert str(caught.value) == f"the engine did not start: {told} (all that it said: {log})"


def test_all_processes_end_with_the_job(tmp_path: Path, stubborn: tuple[str, Path]):
    program, pids = stubborn
    engine = Engine([sys.executable, "-c", program], tmp_path / "log")

    async def main() -> None:
        starting = asyncio.create_task(engine.start())
        running = await processes(pids)
        starting.cancel()
        await engine.stop()
        assert all_end(running)

    asyncio.run(main())


def test_killing_ends_them_at_once(tmp_path: Path, stubborn: tuple[str, Path]):
    program, pids = stubborn
    engine = Engine([sys.executable, "-c", program], tmp_path / "log")

    async def main() -> None:
        starting = asyncio.create_task(engine.start())
        running = await processes(pids)
        engine.kill()
        assert all_end(running, 2)
        with pytest.raises(JobError, match="the engine did not start"):
            await starting
        await engine.stop()

    asyncio.run(main())


def test_all_processes_end_when_the_runner_is_killed(tmp_path: Path, stubborn: tuple[str, Path]):
    program, pids = stubborn
    command = [sys.executable, "-c", RUNNER, program, str(tmp_path / "log")]
    runner = subprocess.Popen(command)
    running = asyncio.run(processes(pids))
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    assert all_end(running)


def test_a_lost_engine_is_replaced_by_another(tmp_path: Path, stubborn: tuple[str, Path]):
    program, pids = stubborn
    log = tmp_path / "log"
    engine = Engine([sys.executable, "-c", program], log)

    async def main() -> None:
        starting = asyncio.create_task(engine.start())
        running = await processes(pids)
        starting.cancel()
        pids.unlink()
        again = asyncio.create_task(engine.again())
        others = await processes(pids)
        assert all_end(running)
        assert all(process.is_running() for process in others)
        again.cancel()
        await engine.stop()
        assert all_end(others)

    asyncio.run(main())
