"""A hand-over whose server falls silent, dies or refuses: the rest runs as it comes."""

import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl

from sglang_batchllm.client import channel
from sglang_batchllm.client.channel import find_channel
from sglang_batchllm.wire.request_ids import new_batch_id


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers programs one by one, but hand-overs as `how` says."""

    protocol_version = "HTTP/1.1"
    how = ""
    let_go = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/batchllm/run":
            self._answer(200, {"max_running_requests": 64})
        else:
            self._answer(200, {"model_path": "none"})

    def do_POST(self) -> None:
        if not self.path.startswith("/batchllm/run/"):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(200, {"text": f"<{body['text']}>", "meta_info": {}})
            return
        while size := int(self.rfile.readline(), 16):
            self.rfile.read(size + 2)
        self.rfile.readline()
        if self.how == "refuses":
            self._answer(503, {"error": {"message": "try again later"}})
            return
        if self.how != "never begins":
            self.send_response(200)
            self.end_headers()
            for _ in range(3):
                self.wfile.write(b"\n")
                time.sleep(0.1)
        if self.how != "ends":
            self.let_go.wait(20)
        self.close_connection = True

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[sgl.RuntimeEndpoint]:
    Handler.let_go.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield sgl.RuntimeEndpoint(url, chat_template_name="chatml")
        Handler.let_go.set()
        server.shutdown()


def ask(s: Any, number: int) -> None:
    s += f"{number}" + sgl.gen("a", max_tokens=2)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("never begins", "silent for 1 s"),
        ("falls silent", "silent for 1 s"),
        ("ends", "without all answers"),
        ("refuses", "try again later"),
    ],
)
def test_the_rest_runs_as_it_comes(backend, monkeypatch, caplog, how, said):
    monkeypatch.setattr(Handler, "how", how)
    monkeypatch.setattr(channel, "SILENT_SECONDS", 1)
    caplog.set_level(logging.WARNING)
    started = time.monotonic()
    states = sgl.function(ask).run_batch([{"number": i} for i in range(9)], backend=backend)
    assert time.monotonic() - started < 10
    assert [state["a"] for state in states] == [f"<{i}>" for i in range(9)]
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("sglang_batchllm")]
    (line,) = logged
    assert line.startswith("The rest of the batch runs as it comes") and said in line


def test_errors_name_the_server(backend, monkeypatch):
    monkeypatch.setattr(Handler, "how", "never begins")
    monkeypatch.setattr(channel, "SILENT_SECONDS", 1)
    found = find_channel(backend)
    assert found is not None
    with pytest.raises(ConnectionError, match=f"{backend.base_url} is gone, or was silent for 1 s"):
        next(found.hand_over(new_batch_id(), [b"{}\n"]))
