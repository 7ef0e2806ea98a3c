"""Clients that vanish and connections that break, on a real server."""

import contextlib
import logging
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sglang as sgl

import programs
from engines import API_KEY, Server, wait_until_whole
from sglang_batchllm.client.get_report import get_report

RELEASE_SECONDS = {"pinned": 2.0, "held": 8.0}
"""After its client is gone, a batch holds nothing any more within this time. Requests of second
turns have connections of their own, at which SGLang looks every four seconds."""

CLIENT = """
import sys
import sglang as sgl

def program(s, number):
    s += "A long beginning that all of them share. " * 8 + str(number)
    s += sgl.gen("a", max_tokens=int(sys.argv[3]))
    s += sgl.gen("b", max_tokens=1400)

sgl.function(program).run_batch(
    [{"number": i} for i in range(12)],
    backend=sgl.RuntimeEndpoint(sys.argv[1], api_key=sys.argv[2]),
    temperature=0,
    ignore_eos=True,
)
"""


@pytest.mark.parametrize("first_turn, kind", [(1000, "pinned"), (60, "held")])
def test_a_client_that_is_killed_releases_its_memory(
    server: Server, tmp_path: Path, first_turn: int, kind: str
):
    """Killed while its first turns run, or its second ones. All programs fit into the KV pool, and
    first turns fill pages: their texts are held as long as the second turns run."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    before = get_report(server.url, API_KEY)["total"]["aborted"]
    arguments = [str(script), server.url, API_KEY, str(first_turn)]
    client = subprocess.Popen([sys.executable, *arguments])
    try:
        deadline = time.monotonic() + 240
        while get_report(server.url, API_KEY)["kv_tokens"][kind] == 0:
            assert client.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
    killed = time.monotonic()
    report = wait_until_whole(server.url, API_KEY)
    seconds = time.monotonic() - killed
    print(f"released after {seconds:.2f} s")
    assert seconds < RELEASE_SECONDS[kind]
    assert report["total"]["aborted"] > before


@contextmanager
def proxy(url: str, cut_after: int) -> Iterator[str]:
    """A TCP proxy that breaks the connection of a hand-over after so many bytes of its answer."""
    target = urlsplit(url)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            request = self.request.recv(4096)
            left = cut_after if request.startswith(b"POST /batchllm/run") else sys.maxsize
            with socket.create_connection((target.hostname, target.port)) as upstream:
                upstream.sendall(request)
                threading.Thread(target=self.send_the_rest, args=(upstream,), daemon=True).start()
                while left > 0 and (data := upstream.recv(min(4096, left))):
                    self.request.sendall(data)
                    left -= len(data)

        def send_the_rest(self, upstream: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := self.request.recv(4096):
                    upstream.sendall(data)

    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128  # a short one makes the kernel reset connections

    with Listener(("127.0.0.1", 0), Handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield "http://{}:{}".format(*listener.server_address)
        listener.shutdown()


@pytest.mark.parametrize("cut_after", [0, 1500])
def test_a_connection_that_breaks_costs_no_result(
    server: Server, cut_after: int, caplog: pytest.LogCaptureFixture
):
    """Before the first answer, and among the answers."""
    caplog.set_level(logging.WARNING)  # an engine in this process may have raised it
    program = sgl.function(programs.judge)
    rows = programs.arguments(24)
    direct = sgl.RuntimeEndpoint(server.url, api_key=API_KEY)
    expected = program.run_batch(rows, backend=direct, temperature=0, ignore_eos=True)
    with proxy(server.url, cut_after) as url:
        fragile = sgl.RuntimeEndpoint(url, api_key=API_KEY)
        states = program.run_batch(rows, backend=fragile, temperature=0, ignore_eos=True)
    assert "runs as it comes" in caplog.text
    assert [state.text() for state in states] == [state.text() for state in expected]
    assert [state.error() for state in states] == [None] * len(rows)
    wait_until_whole(server.url, API_KEY)
