"""The worker's loop over a fake job: states, ends, and going on."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from batch_fakes import (
    Clock,
    FakeJobs,
    make_store,
    ordered,
    requests,
    tend_until,
    work_off,
)
from sglang_batchllm.jobs.errors import JobError, RowError
from sglang_batchllm.jobs.records import Answer, answer_record, error_record
from sglang_batchllm.server.batches import running
from sglang_batchllm.server.batches.batch_store import BatchRecord
from sglang_batchllm.server.batches.limits import HOUR
from sglang_batchllm.server.batches.store import Store
from sglang_batchllm.server.batches.tending import AT_ONCE
from sglang_batchllm.server.batches.unfinished import record_expired


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    return make_store(tmp_path, clock)


def lines(store: Store, file_id: str | None) -> list[dict]:
    if file_id is None:
        return []
    file = store.files.get(file_id)
    data = store.directory.content(file.id).read_bytes()
    assert len(data) == file.bytes and file.purpose == "batch_output"
    return [json.loads(line) for line in data.splitlines()]


def results(store: Store, batch_id: str) -> tuple[BatchRecord, list[dict], list[dict]]:
    """The batch, its output and its errors. Nothing of its making is left."""
    batch = store.batches.get(batch_id)
    assert not store.directory.run(batch_id).exists()
    return batch, lines(store, batch.output_file_id), lines(store, batch.error_file_id)


def test_a_batch_is_completed(store: Store):
    data = requests(3) + requests(4, bad=True).splitlines(keepends=True)[3]
    made = ordered(store, data, output_seconds=HOUR)
    work_off(store)
    batch, output, errors = results(store, made.id)
    assert batch.status == "completed"
    assert (batch.total, batch.completed, batch.failed) == (4, 3, 1)
    assert [line["custom_id"] for line in output] == ["r0", "r1", "r2"]
    assert [line["custom_id"] for line in errors] == ["r3"]
    assert batch.output_file_id is not None
    file = store.files.get(batch.output_file_id)
    assert file.filename == f"{batch.id}_output.jsonl"
    assert file.expires_at == file.created_at + HOUR


def test_results_that_are_empty_are_no_files(store: Store):
    good, bad = ordered(store, requests(1)), ordered(store, requests(1, bad=True))
    work_off(store)
    batch, output, errors = results(store, good.id)
    assert len(output) == 1 and not errors and batch.error_file_id is None
    batch, output, errors = results(store, bad.id)
    assert batch.status == "completed" and batch.output_file_id is None and len(errors) == 1


def test_states_and_counts_are_seen_as_it_runs(store: Store):
    made = ordered(store, requests(5))

    async def watch() -> None:
        jobs = FakeJobs(store, hold=2)
        assert store.batches.get(made.id).status == "validating"
        await tend_until(store, jobs, lambda: store.batches.get(made.id).completed == 2)
        batch = store.batches.get(made.id)
        assert batch.status == "in_progress" and batch.total == 5
        assert batch.output_file_id is None

    asyncio.run(watch())  # it is left in the middle, as when the server ends
    assert store.batches.get(made.id).status == "in_progress"
    jobs = FakeJobs(store)
    work_off(store, jobs)
    batch, output, _ = results(store, made.id)
    assert batch.status == "completed" and jobs.answered == 3
    assert Counter(line["custom_id"] for line in output) == Counter(f"r{i}" for i in range(5))


def test_cancelled_half_way(store: Store):
    made = ordered(store, requests(5))

    async def cancel() -> None:
        def ended() -> bool:
            if store.batches.get(made.id).completed == 2:
                store.batches.cancel(made.id)
            return not store.batches.get(made.id).is_open

        with pytest.raises(Exception, match="is cancelled and cannot be"):
            await tend_until(store, FakeJobs(store, hold=2), ended)

    asyncio.run(cancel())
    batch, output, errors = results(store, made.id)
    assert batch.status == "cancelled" and not errors
    assert [line["custom_id"] for line in output] == ["r0", "r1"]
    assert (batch.total, batch.completed, batch.failed) == (5, 2, 0)
    assert set(batch.times) == {"in_progress", "cancelling", "cancelled"}


def test_cancelled_while_nobody_worked(store: Store):
    made = ordered(store, requests(5))
    store.batches.cancel(made.id)
    jobs = FakeJobs(store)
    work_off(store, jobs)
    batch, output, _ = results(store, made.id)
    assert batch.status == "cancelled" and not output and not jobs.answered


@pytest.mark.parametrize("restarted", [False, True])
def test_expired_half_way(store: Store, clock: Clock, restarted: bool):
    """Also where the server was down when it did."""
    rows = requests(5).splitlines(keepends=True)
    made = ordered(store, b"".join([*rows[:3], b"\n", b'{"custom_id": 5}\n', *rows[3:]]), hours=1)

    async def expire() -> None:
        jobs = FakeJobs(store, hold=2)
        await tend_until(store, jobs, lambda: store.batches.get(made.id).completed == 2)
        clock.now += HOUR

    original = store.directory.content(made.input_file_id)
    whole = original.read_bytes()
    original.write_bytes(b"".join(rows))  # the fake does not read what is no request
    asyncio.run(expire())
    original.write_bytes(whole)
    if restarted:
        store = make_store(store.directory.root, clock)
    work_off(store)
    batch, output, errors = results(store, made.id)
    assert batch.status == "expired" and batch.to_json()["expired_at"] == clock.now
    assert [line["custom_id"] for line in output] == ["r0", "r1"]
    assert (batch.total, batch.completed, batch.failed) == (6, 2, 4)
    assert [(each["custom_id"], each["error"]["code"]) for each in errors] == [
        ("r2", "batch_expired"),
        (None, "invalid_request"),
        ("r3", "batch_expired"),
        ("r4", "batch_expired"),
    ]
    assert errors[0]["response"] is None
    assert errors[0]["error"] == {
        "code": "batch_expired",
        "message": "This request was not done when the completion window of its batch ended.",
        "line": 3,
    }


def test_batches_run_side_by_side_and_the_others_wait(store: Store):
    made = [ordered(store, requests(2)) for _ in range(AT_ONCE + 2)]

    async def run() -> FakeJobs:
        jobs = FakeJobs(store, hold=0)

        def many_run() -> bool:
            states = Counter(store.batches.get(each.id).status for each in made)
            return states == {"in_progress": AT_ONCE, "validating": 2}

        await tend_until(store, jobs, many_run)
        return jobs

    assert asyncio.run(run()).most_at_once == AT_ONCE
    work_off(store)
    assert {store.batches.get(each.id).status for each in made} == {"completed"}


def test_what_nobody_can_run_fails_with_the_reason(store: Store):
    made = ordered(store, requests(2))
    path = store.directory.content(made.input_file_id)
    work_off(store, FakeJobs(store, raises=[JobError(f"{path} is no good; mend it")]))
    batch, *_ = results(store, made.id)
    assert batch.status == "failed"
    assert batch.to_json()["errors"] == {
        "object": "list",
        "data": [
            {
                "code": "invalid_batch",
                "message": "the input is no good; mend it",
                "param": None,
                "line": None,
            }
        ],
    }


def test_a_file_without_requests_fails(store: Store):
    made = ordered(store, b"\n")
    path = store.directory.content(made.input_file_id)
    path.write_bytes(b"")
    work_off(store)
    batch, *_ = results(store, made.id)
    assert batch.status == "failed" and batch.errors is not None
    assert batch.errors[0]["message"] == "the input file has no requests"


def test_a_job_that_is_interrupted_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "RETRY_SECONDS", 0.001)
    gone = [ConnectionError("the server is gone")]
    made = ordered(store, requests(2))
    work_off(store, FakeJobs(store, raises=gone * (running.ATTEMPTS - 1)))
    assert store.batches.get(made.id).status == "completed"
    made = ordered(store, requests(2))
    work_off(store, FakeJobs(store, raises=gone * running.ATTEMPTS))
    batch, *_ = results(store, made.id)
    assert batch.status == "failed" and batch.errors is not None
    assert batch.errors[0]["message"] == (
        f"it was interrupted {running.ATTEMPTS} times, the last time by "
        "ConnectionError('the server is gone')"
    )


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_killed_while_results_become_files(store: Store, moved: int):
    """After none, one or both of them were moved."""
    made = ordered(store, requests(2) + requests(3, bad=True).splitlines(keepends=True)[2])

    async def run() -> None:
        jobs = FakeJobs(store, hold=3)
        await tend_until(store, jobs, lambda: store.batches.get(made.id).failed == 1)

    asyncio.run(run())
    store.batches.decide(made.id, "completed")
    folder, record = store.directory.run(made.id), store.batches.get(made.id)
    assert record.status == "finalizing"
    names = [("output.jsonl", record.output_id), ("errors.jsonl", record.error_id)]
    for name, file_id in names[:moved]:
        (folder / name).rename(store.directory.content(file_id))
    again = make_store(store.directory.root)
    again.tidy()
    jobs = FakeJobs(again)
    work_off(again, jobs)
    batch, output, errors = results(again, made.id)
    assert not jobs.answered and batch.status == "completed"
    assert [line["custom_id"] for line in output] == ["r0", "r1"]
    assert [line["custom_id"] for line in errors] == ["r2"]


def test_what_has_a_record_gets_no_other_when_it_expires(tmp_path: Path):
    """Lines that were no requests, and those with another's custom_id, are told by their place."""
    rows = requests(3).splitlines(keepends=True)
    inputs, output, errors = (tmp_path / name for name in ("in", "out", "err"))
    inputs.write_bytes(b"".join([rows[0], b"{\n", b"\n", rows[0], rows[1], rows[2]]))
    output.write_bytes(answer_record("r0", Answer(200, {})))
    errors.write_bytes(
        error_record(2, RowError("invalid_json", "it is none"))
        + error_record(4, RowError("duplicate_custom_id", "it is one", "r0"))
        + answer_record("r1", Answer(400, {}))
        + answer_record("r2", Answer(400, {}))[:40]
    )
    assert record_expired(inputs, output, errors) == (1, 4)
    assert record_expired(inputs, output, errors) == (1, 4)
    found = [json.loads(line) for line in errors.read_bytes().splitlines()]
    assert [(each["custom_id"], (each["error"] or {}).get("line")) for each in found] == [
        (None, 2),
        ("r0", 4),
        ("r1", None),
        ("r2", 6),
    ]


def test_a_request_that_names_no_model_expires_like_others(tmp_path: Path):
    inputs, errors = tmp_path / "in", tmp_path / "errors"
    row = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "Once"}}
    inputs.write_text(json.dumps(row) + "\n")
    assert record_expired(inputs, tmp_path / "out", errors) == (0, 1)
    assert json.loads(errors.read_text())["error"]["code"] == "batch_expired"
