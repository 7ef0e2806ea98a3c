"""Where a job's server comes from: one that runs already, or one that is started for the job."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sglang_batchllm.jobs.errors import JobError, ServerAwayError, ServerLostError
from sglang_batchllm.jobs.server import About, Server

POLL_SECONDS = 0.25

BACK_SECONDS = 60
"""How long a server that somebody else runs may be away."""

_REASON = re.compile(r"(error|exception)\b.*:|^error:|killed|out of memory", re.IGNORECASE)


class Host(Protocol):
    """Of a server. start: has it ready, or raises JobError. again: the same once it was lost."""

    async def start(self) -> tuple[Server, About]: ...

    async def again(self) -> tuple[Server, About]: ...

    async def stop(self) -> None: ...


class Running:
    """A server that somebody else runs."""

    def __init__(self, server: Server):
        self._server = server

    async def start(self) -> tuple[Server, About]:
        await self._server.open()
        try:
            return self._server, await self._server.about()
        except ServerLostError as error:
            raise JobError(f"{error}; start it, or name another one") from None

    async def again(self) -> tuple[Server, About]:
        until = time.monotonic() + BACK_SECONDS
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                return self._server, await self._server.about()
            except ServerLostError as error:
                if time.monotonic() > until:
                    raise ServerAwayError(
                        f"{error}; nothing that is done is lost, run the same command again once "
                        "the server is back"
                    ) from None

    async def stop(self) -> None:
        await self._server.close()


class Engine:
    """A server that is started for a job. command: its arguments without host and port. log: where
    its output goes. api_key: that the arguments set."""

    def __init__(self, command: Sequence[str], log: Path, api_key: str | None = None):
        self._command = command
        self._log = log
        self._api_key = api_key
        self._log_start = 0  # bytes that earlier engines have written
        self._process: subprocess.Popen[bytes] | None = None
        self._server: Server | None = None

    async def start(self) -> tuple[Server, About]:
        port = _free_port()
        flags = [*self._command, "--host", "127.0.0.1", "--port", str(port)]
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sglang_batchllm.jobs.keeper", *flags],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._server = Server(f"http://127.0.0.1:{port}", self._api_key, shared=False)
        await self._server.open()
        while True:
            if self._process.poll() is not None:
                raise JobError(f"the engine did not start: {self._last_words()}")
            with contextlib.suppress(ServerLostError):
                if await self._server.is_ready():
                    return self._server, await self._server.about()
            await asyncio.sleep(POLL_SECONDS)

    async def again(self) -> tuple[Server, About]:
        await self.stop()
        return await self.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await asyncio.to_thread(self._process.wait)
        self._process = None

    def kill(self) -> None:
        """At once, without an orderly end."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        """The line of the log that says most, and where the rest is."""
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - (1 << 15)))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        told = [line for line in lines if _REASON.search(line)] or [line for line in lines if line]
        return f"{told[-1] if told else 'it said nothing'} (all that it said: {self._log})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
