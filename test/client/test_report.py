"""`get_report` of every kind of source, against servers that are made up."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import Runtime

from sglang_batchllm import get_report
from sglang_batchllm.client.exchange import register_in_process
from sglang_batchllm.wire.lines import Reply

KEY = "the-key"
REPORT = {"batches": [], "running": [], "kv_tokens": {"total": 5}}


class Handler(http.server.BaseHTTPRequestHandler):
    """A server with an API key. Paths that begin with a status are answered with it."""

    def do_GET(self) -> None:
        first = self.path.split("/")[1]
        content: Any = {"model_path": "none"}
        status = int(first) if first.isdigit() else 200
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            status = 401
        elif self.path == "/batchllm/report":
            content = REPORT
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def endpoint(url: str) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(url, api_key=KEY, chat_template_name="chatml")


def test_of_a_url(url):
    assert get_report(url, KEY) == get_report(url + "/", api_key=KEY) == REPORT


def test_of_an_endpoint_with_its_key(endpoint):
    assert get_report(endpoint) == REPORT


def test_of_a_runtime(endpoint, monkeypatch):
    monkeypatch.setattr(Runtime, "__init__", lambda self: None)
    monkeypatch.setattr(Runtime, "__del__", lambda self: None)
    runtime = Runtime()
    runtime.endpoint = endpoint
    assert get_report(runtime) == REPORT


class Engine:
    """As much of an engine as the report needs, with or without the flag."""

    def __init__(self, **states: Any):
        self._states = states

    def get_server_info(self) -> dict[str, Any]:
        return {"internal_states": [self._states]}


class InProcess(sgl.RuntimeEndpoint):
    """An engine's backend in this process."""

    def __init__(self) -> None:
        super().__init__(register_in_process(self), chat_template_name="chatml")  # type: ignore

    def request(self, path: str, body: Any, stream: bool) -> Reply:
        return Reply(200, {"model_path": "none"})

    def get_server_info(self) -> dict[str, Any]:
        return Engine(batchllm_report=REPORT).get_server_info()


def test_of_an_engine_and_its_backend():
    assert get_report(Engine(batchllm_report=REPORT)) == REPORT
    assert get_report(InProcess()) == REPORT
    with pytest.raises(ValueError, match="runs without batchllm=True"):
        get_report(Engine())


def test_errors_say_what_to_do(url, endpoint):
    with pytest.raises(PermissionError, match="pass its key as api_key"):
        get_report(url)
    with pytest.raises(PermissionError, match="pass its key as api_key"):
        get_report(endpoint, api_key="another")
    with pytest.raises(ValueError, match=f"the server at {url}/404 runs without --batchllm"):
        get_report(url + "/404", KEY)
    with pytest.raises(RuntimeError, match="answers 503"):
        get_report(url + "/503", KEY)
    with pytest.raises(ConnectionError, match=r"no server answers at http://127\.0\.0\.1:9"):
        get_report("http://127.0.0.1:9")
    with pytest.raises(TypeError, match=r"the URL of a server.*and not 7"):
        get_report(7)  # type: ignore[arg-type]
