"""A head that is too long for the HTTP server gets its answer, though the client still sends it."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import requests
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang_batchllm.server import refused_heads
from sglang_batchllm.server.refused_heads import answer_refused_heads


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(H11Protocol, "send_400_response", H11Protocol.send_400_response)
    answer_refused_heads()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(FastAPI(), http="h11", log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("megabytes", [1, 20])
def test_a_long_url_is_answered(url: str, megabytes: int):
    for _ in range(5):
        answer = requests.post(f"{url}/batchllm/run/{'a' * (megabytes << 20)}", data=b"{}")
        assert answer.status_code == 400
        assert answer.text == "URL and headers of a request have at most 16384 bytes together."


def test_a_client_that_never_ends_is_left(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refused_heads, "READ_BYTES", 1 << 20)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /")
        with pytest.raises(OSError):
            for _ in range(1000):
                client.sendall(b"a" * (1 << 20))


def test_a_client_that_falls_silent_is_left(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refused_heads, "READ_SECONDS", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"GET /" + b"a" * (1 << 17))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        while client.recv(1 << 16):
            pass
        time.sleep(0.5)
        with pytest.raises(OSError):
            for _ in range(10):
                client.sendall(b"a")
                time.sleep(0.05)


def test_what_is_no_http_is_told_so(url: str):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"nonsense\r\n\r\n")
        assert b"Invalid HTTP request received." in client.recv(1 << 16)
