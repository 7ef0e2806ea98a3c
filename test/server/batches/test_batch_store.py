"""Files and batches in the store: what is kept, for how long, and what is refused."""

import sqlite3
import threading
from pathlib import Path

import pytest

from batch_fakes import Clock, keep, make_store, ordered, requests, work_off
from sglang_batchllm.server.batches.database import Database
from sglang_batchllm.server.batches.directory import DirectoryError
from sglang_batchllm.server.batches.errors import ApiError
from sglang_batchllm.server.batches.limits import DAY, HOUR
from sglang_batchllm.server.batches.store import Store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Store:
    return make_store(tmp_path, clock)


def refusal(status: int, call, *args) -> str:
    with pytest.raises(ApiError) as caught:
        call(*args)
    assert caught.value.status == status
    return caught.value.message


def contents(store: Store) -> set[str]:
    return {path.name for path in store.directory.contents.iterdir()}


def test_a_file_lives_until_it_is_deleted(store: Store):
    record = keep(store, b"x\n", "../../etc/passwd")
    assert store.files.get(record.id) == record
    assert record.filename == "../../etc/passwd" and record.bytes == 2
    assert store.directory.content(record.id).read_bytes() == b"x\n"
    store.files.delete(record.id)
    assert not contents(store)
    assert "no file of this id" in refusal(404, store.files.get, record.id)
    assert "no file of this id" in refusal(404, store.files.delete, record.id)


def test_a_file_expires_when_it_was_said_to(store: Store, clock: Clock):
    short = keep(store, b"x", seconds=HOUR)
    long = keep(store, b"y")
    clock.now += HOUR - 1
    store.sweep()
    assert contents(store) == {short.id, long.id}
    clock.now += 1
    store.sweep()
    assert contents(store) == {long.id}
    refusal(404, store.files.get, short.id)
    clock.now += 30 * DAY
    store.sweep()
    assert not contents(store)


def test_an_input_stays_while_a_batch_reads_it(store: Store, clock: Clock):
    file = keep(store, requests(2), seconds=HOUR)
    batch = ordered(store, file)
    message = refusal(409, store.files.delete, file.id)
    assert message == (
        f"{file.id} is the input of {batch.id}, which has not ended; cancel that first, or wait"
    )
    clock.now += HOUR + 1
    store.sweep()
    assert file.id in contents(store)
    work_off(store)
    store.sweep()
    assert file.id not in contents(store)
    assert store.batches.get(batch.id).status == "completed"


def test_pages_go_on_after_what_was_deleted_since(store: Store):
    made = [keep(store, b"x").id for _ in range(5)]
    page, more = store.files.page(None, 2, False, None)
    assert ([file.id for file in page], more) == (made[:2], True)
    for file in page:
        store.files.delete(file.id)
    page, more = store.files.page(page[-1].id, 2, False, None)
    assert ([file.id for file in page], more) == (made[2:4], True)
    page, more = store.files.page(page[-1].id, 2, False, "batch")
    assert ([file.id for file in page], more) == (made[4:], False)
    assert store.files.page(None, 9, True, None)[0][0].id == made[4]
    assert store.files.page(None, 9, True, "batch_output") == ([], False)
    message = refusal(400, store.files.page, "file-0", 2, True, None)
    assert message == "after is the id of the last object of a page"


def test_batches_are_paged_from_the_newest(store: Store):
    file = keep(store, requests(1))
    made = [ordered(store, file).id for _ in range(3)]
    page, more = store.batches.page(None, 2)
    assert ([batch.id for batch in page], more) == ([made[2], made[1]], True)
    page, more = store.batches.page(made[1], 2)
    assert ([batch.id for batch in page], more) == ([made[0]], False)


def test_numbers_are_limited(tmp_path: Path):
    store = make_store(tmp_path, files=2, open_batches=1)
    file = keep(store, requests(1))
    batch = ordered(store, file)
    assert refusal(429, ordered, store, file) == (
        "the server has at most 1 batches that have not ended; cancel some, or wait"
    )
    store.batches.cancel(batch.id)
    work_off(store)
    ordered(store, file)
    keep(store, b"x")
    assert refusal(429, keep, store, b"x") == (
        "the server keeps at most 2 files; delete some first"
    )


def test_a_batch_takes_an_input_that_is_one(store: Store):
    batch = ordered(store, requests(1))
    work_off(store)
    output = store.batches.get(batch.id).output_file_id
    assert output is not None
    message = refusal(400, ordered, store, store.files.get(output))
    assert message == "the input of a batch is a file of purpose 'batch'"


def test_what_has_ended_cannot_be_cancelled(store: Store):
    batch = ordered(store, requests(1))
    work_off(store)
    assert refusal(409, store.batches.cancel, batch.id) == (
        f"{batch.id} is completed and cannot be cancelled"
    )
    other = ordered(store, requests(1))
    assert store.batches.cancel(other.id).status == "cancelling"
    assert store.batches.cancel(other.id).status == "cancelling"
    work_off(store)
    assert "is cancelled and cannot" in refusal(409, store.batches.cancel, other.id)


def test_whoever_cancels_first_is_heeded(store: Store):
    """Whether the worker or the client is faster, both see the same end."""
    batch = ordered(store, requests(1))
    store.batches.cancel(batch.id)
    store.batches.decide(batch.id, "completed")
    assert store.batches.get(batch.id).outcome == "cancelled"
    batch = ordered(store, requests(1))
    store.batches.decide(batch.id, "completed")
    refusal(409, store.batches.cancel, batch.id)
    store.batches.decide(batch.id, "failed", [])
    assert store.batches.get(batch.id).outcome == "completed"


def test_times_are_kept(store: Store, clock: Clock):
    batch = ordered(store, requests(1), hours=2)
    assert batch.expires_at == batch.created_at + 2 * HOUR == int(clock.now) + 2 * HOUR
    clock.now += 5
    work_off(store)
    body = store.batches.get(batch.id).to_json()
    assert body["in_progress_at"] == body["finalizing_at"] == body["completed_at"] == clock.now
    for state in ("failed", "expired", "cancelling", "cancelled"):
        assert body[f"{state}_at"] is None


def test_records_of_batches_go_in_the_end(store: Store, clock: Clock):
    ended, lasting = ordered(store, requests(1)), ordered(store, requests(1), hours=24)
    store.batches.cancel(ended.id)
    store.batches.decide(ended.id, "cancelled")
    store.batches.end(ended.id, 0, 0)
    clock.now += 90 * DAY - 1
    store.sweep()
    assert store.batches.get(ended.id).status == "cancelled"
    clock.now += 1
    store.sweep()
    refusal(404, store.batches.get, ended.id)
    assert store.batches.get(lasting.id).is_open


def test_everything_is_there_after_a_restart(tmp_path: Path, clock: Clock):
    store = make_store(tmp_path, clock)
    file = keep(store, requests(3), "naïve.jsonl")
    metadata = {"who": "né"}
    batch = ordered(store, file, metadata=metadata)
    store.batches.begin(batch.id)
    store.batches.count(batch.id, 3, 1, 1)
    store.close()
    again = make_store(tmp_path, clock)
    again.tidy()
    assert again.files.get(file.id) == file
    found = again.batches.get(batch.id)
    assert found.status == "in_progress" and found.metadata == metadata
    assert (found.total, found.completed, found.failed) == (3, 1, 1)
    assert [each.id for each in again.batches.open()] == [batch.id]


def test_what_a_killed_server_left_is_removed(store: Store):
    kept, batch = keep(store, b"x"), ordered(store, requests(1))
    orphan = "file-" + "0" * 32
    foreign = store.directory.contents / "thesis.txt"
    mine = store.directory.runs / "notes"
    for path in (
        store.directory.content(orphan),
        store.directory.upload(orphan),
        foreign,
        store.directory.content(batch.output_id),
    ):
        path.write_bytes(b"x")
    for folder in (mine, store.directory.run(batch.id), store.directory.run("batch_" + "0" * 32)):
        folder.mkdir()
    store.tidy()
    assert contents(store) == {kept.id, batch.input_file_id, batch.output_id, foreign.name}
    assert not [*store.directory.uploads.iterdir()]
    assert {path.name for path in store.directory.runs.iterdir()} == {mine.name, batch.id}


def test_two_processes_write_at_once(tmp_path: Path):
    """Each has its own connection, as the server and its worker do."""
    stores = [make_store(tmp_path), make_store(tmp_path)]
    batch = ordered(stores[0], requests(1))

    def write(store: Store) -> None:
        for number in range(100):
            store.batches.count(batch.id, 100, number + 1, 0)
            store.batches.get(batch.id)

    threads = [threading.Thread(target=write, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert stores[0].batches.get(batch.id).completed == 100


def test_a_store_of_a_newer_version_is_refused(store: Store):
    path = store.directory.database
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(DirectoryError) as caught:
        make_store(store.directory.root)
    assert str(caught.value) == (
        f"{path} was written by a newer version of sglang-batchllm (schema 2, known here: 1); "
        "use that version, or name another directory."
    )


def test_a_file_that_is_no_store_is_refused(tmp_path: Path):
    path = tmp_path / "state.sqlite"
    path.write_text("This is a text. " * 100)
    with pytest.raises(DirectoryError) as caught:
        Database(path)
    assert str(caught.value) == (
        f"{path} cannot be used: file is not a database; name another directory."
    )
