"""What a client makes of a server's answers to a hand-over."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from sglang_batchllm.client.channel import Channel


class Answering(ThreadingHTTPServer):
    status = 200


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Answering)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"null")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def channel(server: Answering) -> Channel:
    endpoint = RuntimeEndpoint.__new__(RuntimeEndpoint)  # it would ask the server for its model
    endpoint.base_url = f"http://127.0.0.1:{server.server_address[1]}"
    endpoint.api_key = endpoint.verify = None
    return Channel(endpoint, max_running_requests=1)


@pytest.mark.parametrize("status", [200, 404])
def test_programs_of_a_batch_that_is_closed_have_ended(
    server: Answering, channel: Channel, status: int
):
    server.status = status
    channel.end_programs("0" * 32, {0: True})


@pytest.mark.parametrize("status", [400, 500])
def test_other_answers_are_raised(server: Answering, channel: Channel, status: int):
    server.status = status
    with pytest.raises(RuntimeError, match="null"):
        channel.end_programs("0" * 32, {0: True})
