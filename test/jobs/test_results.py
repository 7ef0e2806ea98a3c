"""The output: valid at every instant, and written by one at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.jobs.errors import JobError, RowError
from sglang_batchllm.jobs.index import id_digest
from sglang_batchllm.jobs.records import Answer, answer_record, error_record, read_record
from sglang_batchllm.jobs.results import Done, Results

USAGE = {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
RECORDS = [
    answer_record("a", Answer(200, {"id": "chat-1", "text": "\u00e9" * 20, **USAGE})),
    answer_record("b", Answer(400, {"error": {"message": "no"}})),
    error_record(3, RowError("invalid_json", "the line is not JSON")),
    error_record(4, RowError("engine_died", "it died", "d"), "in.jsonl"),
    answer_record("e", Answer(200, {"text": "x" * 100_000})),
]
WHOLE = b"".join(RECORDS)


@given(st.integers(0, len(WHOLE)))
def test_a_file_cut_anywhere_loses_only_the_torn_line(cut: int):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        path.write_bytes(WHOLE[:cut])
        results = Results.at(path, None)
        results.open()
        left = WHOLE[: WHOLE.rfind(b"\n", 0, cut) + 1]
        assert path.read_bytes() == left
        assert len([*results.recorded()]) == left.count(b"\n")
        results.append(RECORDS[0], ok=True)
        results.close()
        assert path.read_bytes() == left + RECORDS[0]


@pytest.mark.parametrize("tail", [bytes(5000), RECORDS[0][:60] + bytes(100)])
def test_what_a_machine_leaves_that_lost_its_power_is_cut_off(tmp_path: Path, tail: bytes):
    path = tmp_path / "out"
    path.write_bytes(RECORDS[0] + tail)
    results = Results.at(path, None)
    results.open()
    assert path.read_bytes() == RECORDS[0]
    results.close()


@pytest.mark.parametrize("content", [b"one line\nno end", b"no end at all", b'{"id": 5}', b"\n\0x"])
def test_a_file_of_somebody_else_is_left_as_it_was(tmp_path: Path, content: bytes):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    results = Results.at(path, None)
    with pytest.raises(JobError, match=r"thesis\.txt .* name another file"):
        results.open()
        Done.of(results)
    results.close()
    assert path.read_bytes() == content


def test_two_writers_are_refused(tmp_path: Path):
    first, second = (Results.at(tmp_path / "out", tmp_path / "bad") for _ in range(2))
    first.open()
    with pytest.raises(JobError, match=r"another run writes .*out; wait for it, or stop it"):
        second.open()
    second.close()
    first.close()
    second.open()
    second.close()


def test_where_one_can_not_be_opened_the_other_is_free(tmp_path: Path):
    with pytest.raises(JobError, match="missing/bad can't be written"):
        Results.at(tmp_path / "out", tmp_path / "missing/bad").open()
    results = Results.at(tmp_path / "out", None)
    results.open()
    results.close()


def test_errors_may_go_to_the_output_by_name(tmp_path: Path):
    results = Results.at(tmp_path / "out", tmp_path / "out")
    results.open()
    results.append(RECORDS[2], ok=False)
    results.close()
    assert (tmp_path / "out").read_bytes() == RECORDS[2]


@pytest.mark.parametrize("room", [0, 1, 100, len(RECORDS[4]) - 1])
def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int):
    path = tmp_path / "out"
    results = Results.at(path, None)
    results.open()
    results.append(RECORDS[0], ok=True)
    write, left = os.write, room

    def write_what_fits(fd: int, data: Any) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(fd, data[: min(left, 40)])
        left -= written
        return written

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_what_fits)
        with pytest.raises(JobError) as caught:
            results.append(RECORDS[4], ok=True)
    told = "the disk is full; mend that and run the same command again"
    assert str(caught.value) == f"{path} can't be written: {told}"
    assert path.read_bytes() == RECORDS[0]
    results.append(RECORDS[1], ok=True)  # there is room again
    results.close()
    assert path.read_bytes() == RECORDS[0] + RECORDS[1]


@pytest.mark.parametrize("place", ["folder", "missing/out"])
def test_what_can_not_be_written_is_said(tmp_path: Path, place: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(JobError, match=f"{place} can't be written: "):
        Results.at(tmp_path / place, None).open()


@pytest.mark.parametrize(
    "line",
    [
        b"text",
        b"{}",
        b"[]",
        b"5",
        b"null",
        b'{"custom_id": "a"}',
        b'{"custom_id": "a", "response": 5, "error": null}',
        b'{"custom_id": "a", "response": null, "error": {"code": 5}}',
        b'{"custom_id": "a", "response": null, "error": {"line": "x"}}',
        b"",
    ],
)
def test_an_output_with_anything_else_is_refused(tmp_path: Path, line: bytes):
    path = tmp_path / "out"
    path.write_bytes(RECORDS[0] + line + b"\n")
    results = Results.at(path, None)
    results.open()
    with pytest.raises(JobError) as caught:
        Done.of(results)
    results.close()
    told = "has something else than records in line 2; name another file"
    assert str(caught.value) == f"{path} {told}"


def test_done_counts_what_both_files_hold(tmp_path: Path):
    output, errors = tmp_path / "out", tmp_path / "bad"
    output.write_bytes(RECORDS[0] + RECORDS[4])
    errors.write_bytes(RECORDS[1] + RECORDS[2] + RECORDS[3])
    results = Results.at(output, errors)
    results.open()
    done = Done.of(results)
    results.close()
    assert (done.count, done.ok, done.output_tokens) == (5, 2, 3)
    assert done.places == {(None, 3), ("in.jsonl", 4)}
    assert done.digests.tobytes() == b"".join(map(id_digest, ["a", "e", "b"]))


@pytest.mark.parametrize("content", [None, [], [1], "text", 5, {}, {"usage": None}, {"usage": 5}])
@pytest.mark.parametrize("status", [200, 500])
def test_every_record_that_is_written_can_be_read(content: Any, status: int):
    record = read_record(answer_record("a", Answer(status, content)))
    assert (record.custom_id, record.ok, record.place) == ("a", status == 200, None)


def test_records_have_the_form_of_openais():
    answer, error = json.loads(RECORDS[0]), json.loads(RECORDS[3])
    assert answer.keys() == error.keys() == {"id", "custom_id", "response", "error"}
    assert answer["response"].keys() == {"status_code", "request_id", "body"}
    assert answer["response"]["request_id"] == "chat-1"
    assert answer["error"] is None and error["response"] is None
    assert error["error"] == {
        "code": "engine_died",
        "message": "it died",
        "line": 4,
        "file": "in.jsonl",
    }
    assert answer["id"].startswith("batch_req_") and answer["id"] != error["id"]
