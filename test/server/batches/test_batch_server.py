"""Files and batches of a real server, through OpenAI's own client."""

import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests as http

from batch_fakes import COMPLETIONS, requests
from engines import API_KEY, Server

CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
LONG: dict[str, Any] = {"temperature": 0, "max_tokens": 150, "ignore_eos": True}


def client_of(server: Server, api_key: str = API_KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def start(client: openai.OpenAI, data: bytes, endpoint: str = COMPLETIONS) -> Any:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",  # type: ignore[arg-type]
    )


def wait(client: openai.OpenAI, batch: Any, is_so: Any = None, seconds: float = 90) -> Any:
    is_so = is_so or (lambda now: now.status in ("completed", "failed", "cancelled", "expired"))
    deadline = time.monotonic() + seconds
    while not is_so(batch):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    content = client.files.content(file_id or "").read()
    return [json.loads(line) for line in content.splitlines()]


def done(batch: Any) -> int:
    return batch.request_counts.completed


def test_upload_batch_results_delete(server: Server, client: openai.OpenAI, model: str):
    """Of chat requests, one of which fails; the texts are those of single requests."""
    messages = [[{"role": "user", "content": f"Question {i}?"}] for i in range(6)]
    bodies = [{"model": model, "messages": each} | SHORT for each in messages]
    bodies[4]["temperature"] = -1
    rows = [
        {"custom_id": f"q{i}", "method": "POST", "url": CHAT, "body": body}
        for i, body in enumerate(bodies)
    ]
    batch = wait(client, start(client, "\n".join(map(json.dumps, rows)).encode(), CHAT))
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (6, 5, 1)
    output = {line["custom_id"]: line for line in lines(client, batch.output_file_id)}
    assert sorted(output) == ["q0", "q1", "q2", "q3", "q5"]
    for i in (0, 5):
        body = output[f"q{i}"]["response"]["body"]
        alone = server.post(CHAT, bodies[i]).json()
        assert body["choices"][0]["message"] == alone["choices"][0]["message"]
        assert output[f"q{i}"]["error"] is None
    (error,) = lines(client, batch.error_file_id)
    assert error["custom_id"] == "q4" and "temperature" in json.dumps(error)
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(file_id).deleted
    assert not {file.id for file in client.files.list()} & {
        batch.input_file_id,
        batch.output_file_id,
        batch.error_file_id,
    }


def test_two_at_once_and_one_is_cancelled_half_way(client: openai.OpenAI, model: str):
    first = start(client, requests(200, model=model, **LONG))
    second = start(client, requests(200, model=model, **LONG))
    wait(client, first, lambda now: now.status == "in_progress")
    wait(client, second, lambda now: now.status == "in_progress")
    assert client.batches.retrieve(first.id).status == "in_progress"  # side by side
    wait(client, second, lambda now: done(now) > 0)
    assert client.batches.cancel(second.id).status == "cancelling"
    second = wait(client, second, seconds=15)
    assert second.status == "cancelled" and 0 < done(second) < 200
    output = lines(client, second.output_file_id)
    assert len({line["custom_id"] for line in output}) == len(output) == done(second)
    first = wait(client, first)
    assert first.status == "completed" and done(first) == 200


def test_the_api_key_guards_it(server: Server, client: openai.OpenAI):
    stranger = client_of(server, "wrong")
    batch = client.batches.list(limit=1).data[0]
    for call in (
        stranger.files.list,
        stranger.batches.list,
        lambda: stranger.files.create(file=b"x", purpose="batch"),
        lambda: stranger.files.retrieve(batch.input_file_id),
        lambda: stranger.files.content(batch.input_file_id),
        lambda: stranger.files.delete(batch.input_file_id),
        lambda: stranger.batches.retrieve(batch.id),
        lambda: stranger.batches.cancel(batch.id),
        lambda: start(stranger, b"x"),
    ):
        with pytest.raises(openai.AuthenticationError):
            call()
    assert http.get(f"{server.url}/v1/files", timeout=10).status_code == 401
    assert http.post(f"{server.url}/v1/batches", timeout=10).status_code == 401


@pytest.mark.timeout(600)  # of two servers
def test_killed_in_the_middle_and_started_again(tiny_model: Path, tmp_path: Path):
    """All its processes at once; what it had is finished, each request once."""
    flags = ("--batchllm", "--batchllm-files", str(tmp_path / "files"))
    server = Server(tiny_model, *flags)
    try:
        server.wait()
        client = client_of(server)
        model = client.models.list().data[0].id
        batch = start(client, requests(150, model=model, **LONG))
        batch = wait(client, batch, lambda now: done(now) > 0)
        process = psutil.Process(server.process.pid)
        for each in [*process.children(recursive=True), process]:
            each.kill()
        before = done(batch)
    finally:
        server.stop()
    (run,) = (tmp_path / "files" / "runs").iterdir()
    left = (run / "output.jsonl").read_bytes().count(b"\n")
    assert before <= left < 150
    server = Server(tiny_model, *flags)
    try:
        server.wait()
        client = client_of(server)
        batch = wait(client, client.batches.retrieve(batch.id))
        assert batch.status == "completed" and done(batch) == 150
        output = lines(client, batch.output_file_id)
        assert Counter(line["custom_id"] for line in output) == Counter(f"r{i}" for i in range(150))
        assert all(line["response"]["body"]["choices"][0]["text"] for line in output)
        # Asked to end, it does not first work off what it has.
        batch = start(client, requests(400, model=model, **LONG))
        wait(client, batch, lambda now: now.status == "in_progress")
        server.process.terminate()
        server.process.wait(60)
    finally:
        server.stop()


def test_a_directory_that_cannot_be_used_is_said_before_a_model_is_loaded(
    tiny_model: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    command = [*Server.LAUNCH, "--model-path", str(tiny_model), "--batchllm"]
    command += ["--batchllm-files", str(tmp_path / "file")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.rstrip().splitlines()[-1] == (
        f"error: --batchllm-files: files cannot be kept in {tmp_path / 'file'}: File exists; name "
        "a directory that can be written to."
    )
