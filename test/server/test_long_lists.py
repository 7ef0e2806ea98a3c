"""A list of 20,000 requests keeps nobody else from being answered, nor does its end."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from engines import API_KEY, Server, wait_until_whole

REQUESTS = 20_000

WAIT_SECONDS = 2.0
"""A lone request waits at most so long while the list comes in and runs, on an idle machine of two
cores."""

WAIT_SECONDS_AFTER = 1.0
"""The same once the list's client is gone."""

EVERY_SECONDS = 0.5
EVERY_SECONDS_AFTER = 0.1
RUN_SECONDS = 4.0
"""For which the list is watched after all of it has come in."""


@pytest.fixture(scope="module")
def quick_server(tiny_model: Path) -> Iterator[Server]:
    """Of few requests at a time, since this machine takes a step one by one through them: what is
    waited for is the list, and not the steps of a thousand requests."""
    server = Server(tiny_model, "--batchllm", "--max-running-requests", "48")
    server.wait()
    yield server
    server.stop()


class Shared:
    """How much slower than alone a server is on a machine that others use, too."""

    def __init__(self, server: Server) -> None:
        self._processes = [psutil.Process(), psutil.Process(server.process.pid)]
        self._processes += self._processes[1].children(recursive=True)
        self._began = self._times()

    def _times(self) -> tuple[float, float, float]:
        """The clock, and the processor seconds of all processes and of these."""
        total = psutil.cpu_times()
        own = sum(sum(process.cpu_times()[:2]) for process in self._processes)
        return time.monotonic(), total.user + total.nice + total.system, own

    def factor(self) -> float:
        """Since this was made; at least 1."""
        clock, total, own = (
            now - then for now, then in zip(self._times(), self._began, strict=True)
        )
        cores = psutil.cpu_count() or 1
        others = max(total - own, 0) / clock
        return cores / max(cores - others, 0.2)


def lone_seconds(server: Server) -> float:
    body = {"text": "Hello there", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    begun = time.monotonic()
    server.post("/generate", body).raise_for_status()
    return time.monotonic() - begun


@contextmanager
def asking(server: Server, every: float) -> Iterator[list[Future[float]]]:
    """Lone requests are sent meanwhile, one each so many seconds, however long they take; these are
    their seconds, complete at the end."""
    answers: list[Future[float]] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(every):
            answers.append(pool.submit(lone_seconds, server))

    with ThreadPoolExecutor(200) as pool:
        asker = threading.Thread(target=ask)
        asker.start()
        try:
            yield answers
        finally:
            ended.set()
            asker.join()


def send_list(server: Server) -> http.client.HTTPConnection:
    """The answer is left to come."""
    texts = [
        f"Document {index // 10}: " + "The lighthouse was lit in 1861. " * 2 + f"question {index}?"
        for index in range(REQUESTS)
    ]
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    body = json.dumps({"text": texts, "sampling_params": params})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("POST", "/generate", body, headers)
    return connection


def requests_come(server: Server) -> int:
    running = server.get("/batchllm/report").json()["running"]
    return max((one["requests"] for one in running), default=0)


def test_lone_requests_are_answered_beside_a_long_list_and_after_it(quick_server: Server):
    lone_seconds(quick_server)
    shared = Shared(quick_server)
    with asking(quick_server, EVERY_SECONDS) as answers:
        connection = send_list(quick_server)
        deadline = time.monotonic() + 60 * shared.factor()
        while requests_come(quick_server) < REQUESTS:
            assert time.monotonic() < deadline, "the list did not come in"
            time.sleep(EVERY_SECONDS)
        time.sleep(RUN_SECONDS)
    seconds = [answer.result() for answer in answers]
    factor = shared.factor()
    print(f"beside the list: {max(seconds):.2f} s at most, machine shared {factor:.1f}-fold")
    assert len(seconds) > RUN_SECONDS / EVERY_SECONDS
    assert max(seconds) < WAIT_SECONDS * factor

    shared = Shared(quick_server)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    with asking(quick_server, EVERY_SECONDS_AFTER) as answers:
        time.sleep(2 * WAIT_SECONDS_AFTER)
    seconds = [answer.result() for answer in answers]
    factor = shared.factor()
    print(f"once its client is gone: {max(seconds):.2f} s at most, shared {factor:.1f}-fold")
    assert max(seconds) < WAIT_SECONDS_AFTER * factor
    report = wait_until_whole(quick_server.url, API_KEY)
    assert report["running"] == []
    (dropped,) = [one for one in report["batches"] if one["requests"] == REQUESTS]
    assert dropped["aborted"] > REQUESTS / 2
    assert dropped["aborted"] + dropped["finished"] == REQUESTS
