"""OpenAI's own client over HTTP: what it sends is understood, and what it gets it can read."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests as http

from batch_fakes import COMPLETIONS, make_store, requests
from batch_server import Served, serving
from sglang_batchllm.server.batches.limits import DAY, HOUR


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(make_store(tmp_path)) as served:
        yield served


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client()


def upload(client: openai.OpenAI, data: bytes, **options: Any) -> Any:
    return client.files.create(file=("in.jsonl", data), purpose="batch", **options)


def create(client: openai.OpenAI, file_id: str, **options: Any) -> Any:
    order: dict[str, Any] = {"endpoint": COMPLETIONS, "completion_window": "24h"} | options
    return client.batches.create(input_file_id=file_id, **order)


def wait(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 20
    while (batch := client.batches.retrieve(batch_id)).status not in (
        "completed",
        "failed",
        "cancelled",
        "expired",
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return batch


def strictly(model: Any) -> None:
    """The client takes anything; this checks it against its own types."""
    type(model).model_validate(model.to_dict(), strict=True)


def test_the_life_of_a_file(client: openai.OpenAI, tmp_path: Path):
    file = client.files.create(file=("naïve ü.jsonl", b"x\ny\n"), purpose="batch")
    strictly(file)
    assert (file.object, file.bytes, file.filename) == ("file", 4, "naïve ü.jsonl")
    assert (file.purpose, file.status) == ("batch", "processed")
    assert abs(file.created_at - time.time()) < 20
    assert file.expires_at == file.created_at + 30 * DAY
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id) == file
    assert [*client.files.list()] == [file]
    content = client.files.content(file.id)
    assert content.read() == b"x\ny\n"
    assert content.response.headers["content-disposition"] == (
        "attachment; filename*=UTF-8''na%C3%AFve%20%C3%BC.jsonl"
    )
    deleted = client.files.delete(file.id)
    strictly(deleted)
    assert deleted.deleted and deleted.id == file.id
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(file.id)
        assert caught.value.code == "not_found" and caught.value.type == "invalid_request_error"
        assert "there is no file of this id; it may have expired" in caught.value.message
    assert not [*(tmp_path / "files").iterdir()] and not [*(tmp_path / "uploads").iterdir()]


def test_a_file_may_live_shorter(client: openai.OpenAI):
    life = {"anchor": "created_at", "seconds": HOUR}
    file = upload(client, b"x", expires_after=life)
    assert file.expires_at == file.created_at + HOUR


def test_a_large_file_is_not_held_in_memory(served: Served, tmp_path: Path):
    """Neither by the server, which is in this process, nor does it keep others waiting."""
    client = served.client()
    large = tmp_path / "large"
    with large.open("wb") as file:
        for number in range(150):
            file.write(bytes([number]) * (1 << 20))
    before = most = resident()
    slowest = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal slowest, most
        while not done.wait(0.01):
            start = time.monotonic()
            http.get(f"{served.url}/ping", timeout=10)
            slowest = max(slowest, time.monotonic() - start)
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    with large.open("rb") as file:
        made = client.files.create(file=("large", file), purpose="batch")
    digest = hashlib.sha256()
    with client.files.with_streaming_response.content(made.id) as response:
        assert response.headers["content-length"] == str(150 << 20)
        for piece in response.iter_bytes():
            digest.update(piece)
    done.set()
    thread.join()
    assert digest.hexdigest() == hashlib.sha256(large.read_bytes()).hexdigest()
    assert slowest < 1
    assert most - before < 50 << 20


def resident() -> int:
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_lists_are_paged(client: openai.OpenAI):
    made = [upload(client, b"x").id for _ in range(5)]
    assert [file.id for file in client.files.list()] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert [*client.files.list(purpose="batch_output")] == []
    page = client.files.list(limit=2, order="asc", after=made[1])
    assert [file.id for file in page.data] == made[2:4] and page.has_more
    for file in client.files.list(limit=2):
        client.files.delete(file.id)
    assert [*client.files.list()] == []
    file = upload(client, requests(1)).id
    batches = [create(client, file).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)] == batches[::-1]
    assert [batch.id for batch in client.batches.list(after=batches[1])] == batches[:1]


def test_the_life_of_a_batch(client: openai.OpenAI):
    data = requests(3) + requests(4, bad=True).splitlines(keepends=True)[3]
    file = upload(client, data)
    batch = create(client, file.id, metadata={"run": "7"}, completion_window="48h")
    strictly(batch)
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", COMPLETIONS)
    assert (batch.input_file_id, batch.metadata) == (file.id, {"run": "7"})
    assert batch.completion_window == "48h"
    assert batch.expires_at == batch.created_at + 48 * HOUR
    batch = wait(client, batch.id)
    strictly(batch)
    assert batch.status == "completed" and batch.errors is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    output = client.files.content(batch.output_file_id).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == ["r0", "r1", "r2"]
    errors = client.files.content(batch.error_file_id).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in errors] == ["r3"]
    made = client.files.retrieve(batch.output_file_id)
    strictly(made)
    assert made.purpose == "batch_output"
    for each in (file.id, batch.output_file_id, batch.error_file_id):
        client.files.delete(each)
    assert client.batches.retrieve(batch.id) == batch


def test_cancelling(client: openai.OpenAI, served: Served):
    served.jobs.hold = 2
    file = upload(client, requests(5))
    batch = create(client, file.id)
    while client.batches.retrieve(batch.id).request_counts.completed < 2:
        time.sleep(0.02)
    with pytest.raises(openai.ConflictError, match="cancel that first, or wait"):
        client.files.delete(file.id)
    cancelling = client.batches.cancel(batch.id)
    strictly(cancelling)
    assert cancelling.status == "cancelling" and cancelling.cancelling_at is not None
    batch = wait(client, batch.id)
    assert batch.status == "cancelled" and batch.request_counts.completed == 2
    assert len(client.files.content(batch.output_file_id).text.splitlines()) == 2
    with pytest.raises(openai.ConflictError, match="is cancelled and cannot be cancelled"):
        client.batches.cancel(batch.id)
    client.files.delete(file.id)


def test_uploads_at_once(served: Served):
    client = served.client()

    def one(number: int) -> tuple[str, bytes]:
        data = f"{number}\n".encode() * (200_000 + number)
        return upload(client, data).id, data

    with ThreadPoolExecutor(8) as pool:
        made = [*pool.map(one, range(16))]
    for file_id, data in made:
        assert client.files.content(file_id).read() == data
    assert len({file_id for file_id, _ in made}) == len([*client.files.list()]) == 16


def test_a_client_that_goes_away_leaves_nothing(served: Served, tmp_path: Path):
    import socket

    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n"
            "Content-Type: multipart/form-data; boundary=B\r\n\r\n"
            '--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        )
        connection.sendall(head.encode() + b"x" * 3_000_000)
        deadline = time.monotonic() + 10
        while not [*(tmp_path / "uploads").iterdir()]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    while [*(tmp_path / "uploads").iterdir()]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [*served.client().files.list()] == []


PATHS = [
    "..%2f..%2f..%2fetc%2fpasswd",
    "..%2fstate.sqlite",
    "%2e%2e%2fstate.sqlite",
    "/etc/passwd",
    "state.sqlite",
    "file-..%2f..%2fstate.sqlite",
    "file-" + "0" * 32 + "%00",
    "file-" + "0" * 32 + "%0a",
    "FILE-" + "0" * 32,
    "' OR 1=1 --",
    "%ff%fe",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leaves_the_directory(served: Served, tmp_path: Path, path: str):
    upload(served.client(), b"x")
    before = sorted(tmp_path.rglob("*"))
    for method, url in (
        ("GET", f"files/{path}"),
        ("GET", f"files/{path}/content"),
        ("DELETE", f"files/{path}"),
        ("GET", f"batches/{path}"),
        ("POST", f"batches/{path}/cancel"),
    ):
        response = http.request(method, f"{served.url}/v1/{url}", timeout=10)
        assert response.status_code == 404, (method, url)
    order = {"input_file_id": path, "endpoint": COMPLETIONS, "completion_window": "24h"}
    assert http.post(f"{served.url}/v1/batches", json=order, timeout=10).status_code == 404
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\x00b", "x" * 3000, "\r\nX: y", "."])
def test_a_filename_is_only_a_name(served: Served, tmp_path: Path, name: str):
    client = served.client()
    file = client.files.create(file=(name, b"x"), purpose="batch")
    assert len(file.filename) <= 1024
    assert {path.name for path in (tmp_path / "files").iterdir()} == {file.id}
    assert client.files.content(file.id).read() == b"x"
