"""Servers of benchmarks, and the quickest way to ask them: every request at once, on its own
connection, and nothing read of an answer while others are waited for."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from quickstart import Server

CHAT = "/v1/chat/completions"
LOG_LINES = 40


class Usage(NamedTuple):
    """Tokens of a request. cached: of its prompt, those that were not computed."""

    prompt: int
    cached: int
    completion: int


class Running(NamedTuple):
    """A server that somebody else has started."""

    url: str

    def wait_until_ready(self) -> None:
        pass


@contextmanager
def starting(flags: Sequence[str], name: str, url: str | None = None) -> Iterator[Server | Running]:
    """A server that starts, and is gone at the end; `wait_until_ready` is the caller's, who may
    have something to do until then. If anything goes wrong, the end of its log is printed.

    url: of one that runs already, instead.
    """
    if url is not None:
        yield Running(url)
        return
    log = Path(tempfile.gettempdir()) / f"{name.replace(' ', '-')}.log"
    with Server([*flags], log) as server:
        try:
            yield server
        except Exception:
            lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            print("\n".join([*lines, f"(this ends {log})"]), file=sys.stderr, flush=True)
            raise


def session(url: str) -> aiohttp.ClientSession:
    """A connection for each request, as many as there are, and all the time that they take. One
    that is kept may be closed by the server just when it is used again."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    )


async def ask(http: aiohttp.ClientSession, body: bytes) -> bytes:
    async with http.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
        answer = await response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer[:1000]!r}")
    return answer


async def ask_all(http: aiohttp.ClientSession, bodies: Sequence[bytes]) -> list[bytes]:
    return await asyncio.gather(*(ask(http, body) for body in bodies))


def encoded(bodies: Sequence[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(body).encode() for body in bodies]


async def flush_cache(http: aiohttp.ClientSession) -> None:
    async with http.post("/flush_cache", params={"timeout": "30"}) as response:
        assert response.status == 200, await response.text()


def usage_of(answer: dict[str, Any]) -> Usage:
    """Of an answer of a server with --enable-cache-report."""
    usage = answer["usage"]
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    return Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])
