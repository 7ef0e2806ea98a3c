"""A table of what clients do wrong, and exactly what they are told."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from batch_fakes import keep, make_store, requests
from batch_server import make_app
from sglang_batchllm.server.batches import upload
from sglang_batchllm.server.batches.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path, file_bytes=1 << 20)


@pytest.fixture
def client(store: Store) -> TestClient:
    return TestClient(make_app(store), raise_server_exceptions=False)


def check(response: Any, status: int, message: str, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"] == message and error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


HOURS = "it is a number of hours from 1h to 720h, such as 24h"
ORDERS: list[tuple[Any, str, str | None]] = [
    (b"", "the body is not JSON", None),
    (b"{", "the body is not JSON", None),
    (b"\xff", "the body is not JSON", None),
    (b"[" * 100_000, "the body is not JSON", None),
    (b'{"endpoint": "\\ud800"}', "the body is not JSON", None),
    ([], "the body is an object of input_file_id, endpoint, completion_window", None),
    ({"input_file": "x"}, "there is no parameter 'input_file'", "input_file"),
    ({"endpoint": ...}, "endpoint is missing", "endpoint"),
    ({"endpoint": 5}, "endpoint is a string", "endpoint"),
    (
        {"endpoint": "/v1/embeddings"},
        "endpoint is '/v1/embeddings'; it is /v1/chat/completions or /v1/completions",
        "endpoint",
    ),
    ({"completion_window": ...}, "completion_window is missing", "completion_window"),
    ({"completion_window": 24}, "completion_window is a string", "completion_window"),
    *(
        (
            {"completion_window": window},
            f"completion_window is {window!r}; {HOURS}",
            "completion_window",
        )
        for window in ("24", "0h", "721h", "1d", "-1h", "1.5h", " 24h", "24h\n", "٣h")
    ),
    ({"input_file_id": ...}, "input_file_id is missing", "input_file_id"),
    ({"input_file_id": None}, "input_file_id is a string", "input_file_id"),
    ({"metadata": [1]}, "metadata is an object of at most 16 keys", "metadata"),
    (
        {"metadata": {str(i): "" for i in range(17)}},
        "metadata is an object of at most 16 keys",
        "metadata",
    ),
    (
        {"metadata": {"k" * 65: ""}},
        f"the key '{'k' * 65}' of metadata has more than 64 characters",
        "metadata",
    ),
    ({"metadata": {"k": 1}}, "metadata at 'k' is a string of at most 512 characters", "metadata"),
    (
        {"metadata": {"k": "v" * 513}},
        "metadata at 'k' is a string of at most 512 characters",
        "metadata",
    ),
    (
        {"output_expires_after": {"seconds": 3600}},
        "output_expires_after has an anchor and seconds",
        "output_expires_after",
    ),
    (
        {"output_expires_after": {"anchor": "now", "seconds": 3600}},
        "the anchor of output_expires_after is 'created_at'",
        "output_expires_after",
    ),
    (
        {"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
        "the seconds of output_expires_after are a whole number from 3600 to 2592000",
        "output_expires_after",
    ),
    (
        {"output_expires_after": {"anchor": "created_at", "seconds": True}},
        "the seconds of output_expires_after are a whole number from 3600 to 2592000",
        "output_expires_after",
    ),
]


@pytest.mark.parametrize(("body", "message", "param"), ORDERS)
def test_orders(client: TestClient, store: Store, body: Any, message: str, param: str | None):
    file = keep(store, requests(1))
    if isinstance(body, dict):
        whole = {"input_file_id": file.id, "endpoint": "/v1/completions"}
        whole |= {"completion_window": "24h"} | body
        body = {key: value for key, value in whole.items() if value is not ...}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    check(client.post("/v1/batches", content=data), 400, message, param)
    assert not store.batches.open()


@pytest.mark.parametrize(
    ("keys", "right"),
    [
        ({"api_key": "key", "admin_api_key": None}, "key"),
        ({"api_key": "key", "admin_api_key": "admin"}, "key"),
        ({"api_key": None, "admin_api_key": "admin"}, None),
    ],
)
def test_keys(store: Store, keys: dict[str, str | None], right: str | None):
    """As SGLang guards /v1/completions: the API key opens it, an admin key neither does nor has
    to, and without an API key it is open."""
    from sglang.srt.utils.auth import add_api_key_middleware

    app = make_app(store)
    add_api_key_middleware(app, **keys)
    client = TestClient(app)
    for key in (None, "key", "admin", "wrong"):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        for method, path in (
            ("GET", "files"),
            ("POST", "files"),
            ("GET", "files/x"),
            ("GET", "files/x/content"),
            ("DELETE", "files/x"),
            ("GET", "batches"),
            ("POST", "batches"),
            ("GET", "batches/x"),
            ("POST", "batches/x/cancel"),
        ):
            status = client.request(method, f"/v1/{path}", headers=headers).status_code
            assert (status != 401) == (right is None or key == right), (key, method, path)


def test_an_order_that_is_too_long(client: TestClient):
    data = b" " * ((1 << 20) + 1)
    check(client.post("/v1/batches", content=data), 413, "the body is at most 1048576 bytes", None)


FORMS: list[tuple[dict[str, str], str, str]] = [
    ({}, "purpose is missing", "purpose"),
    (
        {"purpose": "fine-tune"},
        "purpose is 'fine-tune'; this server has a use for 'batch' only",
        "purpose",
    ),
    (
        {"purpose": "batch_output"},
        "purpose is 'batch_output'; this server has a use for 'batch' only",
        "purpose",
    ),
    (
        {"purpose": "batch", "expires_after[seconds]": "4000"},
        "the anchor of expires_after is 'created_at'",
        "expires_after",
    ),
    (
        {"purpose": "batch", "expires_after": "4000"},
        "expires_after has an anchor and seconds",
        "expires_after",
    ),
    *(
        (
            {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": seconds,
            },
            "the seconds of expires_after are a whole number from 3600 to 2592000",
            "expires_after",
        )
        for seconds in ("", "3599", "2592001", "1e9", "-1", "9" * 5000)
    ),
]


@pytest.mark.parametrize(("fields", "message", "param"), FORMS)
def test_forms(client: TestClient, store: Store, fields: dict, message: str, param: str):
    response = client.post("/v1/files", data=fields, files={"file": ("f", b"x")})
    check(response, 400, message, param)
    assert store.files.page(None, 1, True, None) == ([], False)


def test_a_file_that_is_empty(client: TestClient):
    response = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"")})
    check(response, 400, "the file is empty", "file")


def test_no_form(client: TestClient):
    message = "the body is multipart/form-data with the parts purpose and file"
    check(client.post("/v1/files", json={"purpose": "batch"}), 400, message, None)


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_that_is_too_large(client: TestClient, store: Store, declared: bool):
    def send(size: int) -> Any:
        request = client.build_request(
            "POST", "/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"x" * size)}
        )
        body = request.read()
        kind = {"content-type": request.headers["content-type"]}
        pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
        return client.post("/v1/files", content=body if declared else pieces, headers=kind)

    check(send((1 << 20) + 200_000), 413, "a file is at most 1048576 bytes", "file")
    check(send((1 << 20) + 1), 413, "a file is at most 1048576 bytes", "file")
    assert send(1 << 20).status_code == 200


def test_a_disk_that_is_full(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    free = SimpleNamespace(free=(2 << 30) - 1)
    monkeypatch.setattr(upload, "shutil", SimpleNamespace(disk_usage=lambda _: free))
    response = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"x")})
    message = "less than 2147483648 bytes are free on the server's disk; delete files"
    check(response, 507, message, None)
    assert shutil.disk_usage("/").free


def test_too_many_uploads_at_once(tmp_path: Path):
    client = TestClient(make_app(make_store(tmp_path, uploads_at_once=0)))
    response = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("f", b"x")})
    check(response, 503, "too many uploads at once; try again soon", None)


LISTS = [
    ("files?limit=0", "limit is a number from 1 to 10000", "limit"),
    ("files?limit=10001", "limit is a number from 1 to 10000", "limit"),
    ("files?limit=x", "limit is a number from 1 to 10000", "limit"),
    ("batches?limit=101", "limit is a number from 1 to 100", "limit"),
    ("files?order=up", "order is asc or desc", "order"),
    ("files?after=x", "after is the id of the last object of a page", "after"),
    ("batches?after=x", "after is the id of the last object of a page", "after"),
    ("files?page=2", "there is no parameter 'page'", "page"),
    ("batches?purpose=batch", "there is no parameter 'purpose'", "purpose"),
]


@pytest.mark.parametrize(("path", "message", "param"), LISTS)
def test_lists(client: TestClient, path: str, message: str, param: str):
    check(client.get(f"/v1/{path}"), 400, message, param)


def test_a_fault_of_ours_says_so_and_no_more(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(store.files, "page", fail)
    check(client.get("/v1/files"), 500, "the server failed; its log says why", None)


def test_content_that_somebody_removed(client: TestClient, store: Store):
    file = keep(store, b"x")
    store.directory.content(file.id).unlink()
    response = client.get(f"/v1/files/{file.id}/content")
    check(response, 404, "the content of the file is gone", None)
