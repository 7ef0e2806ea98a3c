"""Outputs of several runs in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from pretended_server import requests
from sglang_batchllm.client.command import main
from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.jobs.records import Answer, answer_record, error_record


def ids_of(path: Path) -> list[str | None]:
    return [orjson.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def answer(custom_id: str, status: int = 200) -> bytes:
    return answer_record(custom_id, Answer(status, {"id": custom_id}))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(requests(6) + b"no json\n")
    return path


@pytest.fixture
def ids(inputs: Path) -> list[str]:
    return [orjson.loads(line)["custom_id"] for line in inputs.read_bytes().splitlines()[:6]]


def merge(inputs: Path, *records: bytes) -> tuple[Result, Path]:
    """Each of `records` is an output."""
    outputs = []
    for number, content in enumerate(records):
        outputs.append(inputs.with_name(f"answers-{number}.jsonl"))
        outputs[-1].write_bytes(content)
    merged = inputs.with_name("merged.jsonl")
    args = ["merge", "-i", inputs, *outputs, "-o", merged]
    return CliRunner().invoke(main, [*map(str, args)]), merged


def test_records_come_in_the_order_of_the_requests(inputs: Path, ids: list[str]):
    bad = error_record(4, RowError("invalid_json", "the line is not JSON"))
    first = answer(ids[4]) + bad + answer(ids[0])
    second = answer(ids[5]) + answer(ids[1]) + answer(ids[3], 400) + answer(ids[2])
    result, merged = merge(inputs, first, second)
    assert result.exit_code == 0, result.output
    assert "7 records, 2 of requests that failed" in result.stderr
    assert ids_of(merged) == [*ids, None]
    assert sorted(merged.read_bytes().splitlines()) == sorted((first + second).splitlines())


def test_of_several_records_one_that_succeeded_counts(inputs: Path, ids: list[str]):
    again = answer(ids[2])
    result, merged = merge(
        inputs, b"".join(answer(one, 500) for one in ids), again + answer(ids[2])
    )
    assert result.exit_code == 0, result.output
    assert merged.read_bytes().splitlines()[2] == again.strip()
    assert "6 records, 5 of requests that failed" in result.stderr


@pytest.mark.parametrize("outputs", [(b"",), (b"", b"")])
def test_what_is_missing_is_named(inputs: Path, ids: list[str], outputs: tuple[bytes, ...]):
    result, merged = merge(inputs, *outputs, *(answer(one) for one in ids[:3]))
    assert result.exit_code == 1
    assert f"3 of 6 requests have no record, '{ids[3]}' is the first" in result.stderr
    assert not merged.exists()
    result, merged = merge(inputs, *outputs)
    assert "6 of 6 requests have no record" in result.stderr


def test_what_does_not_belong_is_named(inputs: Path, ids: list[str]):
    whole = b"".join(map(answer, ids))
    result, merged = merge(inputs, whole, answer("stranger"))
    assert result.exit_code == 1
    assert "records of 1 requests that are not in" in result.stderr
    result, merged = merge(inputs, whole, b"{}\n")
    assert "answers-1.jsonl has something else than records in line 1" in result.stderr
    assert not merged.exists()
    merged.write_text("mine")
    result, merged = merge(inputs, whole)
    assert "merged.jsonl is there already" in result.stderr
    assert merged.read_text() == "mine"


@pytest.fixture(params=[".parquet", ".csv"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"reviews{request.param}"
    rows = pa.table({"review": ["good", "bad", "so so", "fine"], "stars": [5, 1, 3, 4]})
    if request.param == ".csv":
        pyarrow.csv.write_csv(rows, path)
    else:
        pyarrow.parquet.write_table(rows, path)
    return path


def read(path: Path) -> dict[str, list[Any]]:
    if path.suffix == ".csv":
        return pyarrow.csv.read_csv(path).to_pydict()
    return pyarrow.parquet.read_table(path).to_pydict()


def label(row: int, status: int = 200) -> bytes:
    choice = {"message": {"content": f"answer {row}"}, "finish_reason": "stop"}
    body = {"choices": [choice]} if status == 200 else {"message": "no"}
    return answer_record(str(row), Answer(status, body))


def merge_table(table: Path, merged: Path, *records: bytes) -> Result:
    outputs = []
    for number, content in enumerate(records):
        outputs.append(table.with_name(f"answers-{number}.jsonl"))
        outputs[-1].write_bytes(content)
    args = ["merge", "-i", table, *outputs, "-o", merged]
    return CliRunner().invoke(main, [*map(str, args)])


@pytest.mark.parametrize("kind", [".parquet", ".csv"])
def test_a_table_gets_the_answers_of_its_parts(table: Path, kind: str):
    merged = table.with_name(f"labelled{kind}")
    result = merge_table(table, merged, label(3) + label(1, 400), label(0) + label(2))
    assert result.exit_code == 0, result.output
    assert "4 records, 1 of requests that failed" in result.stderr
    found = read(merged)
    assert found["stars"] == [5, 1, 3, 4]
    assert [found["answer"][row] for row in (0, 2, 3)] == ["answer 0", "answer 2", "answer 3"]
    assert found["error"][1] == "no"
    assert [*table.parent.glob("*.records.jsonl")] == []


def test_a_table_that_is_cut_is_merged_again(table: Path, tmp_path: Path, tiny_model: Path):
    """By the commands themselves, but for the answers."""
    folder = tmp_path / "shards"
    command = ["plan", "-i", table, "--prompt-column", "review", "--endpoint", "completions"]
    command += ["--model", tiny_model, "--shards", 2, "--into", folder]
    planned = CliRunner().invoke(main, [*map(str, command)])
    assert planned.exit_code == 0, planned.output
    parts = [
        b"".join(label(int(orjson.loads(line)["custom_id"])) for line in shard.open("rb"))
        for shard in sorted(folder.iterdir())
    ]
    assert len(parts) == 2
    merged = tmp_path / "labelled.parquet"
    result = merge_table(table, merged, *parts)
    assert result.exit_code == 0, result.output
    assert read(merged)["answer"] == [f"answer {row}" for row in range(4)]


def test_what_a_merged_table_refuses(table: Path, tmp_path: Path):
    merged = tmp_path / "labelled.parquet"
    bad = error_record(4, RowError("invalid_json", "the line is not JSON"))
    all_rows = b"".join(map(label, range(4)))
    for records, target, message in [
        (label(0), merged, "3 of 4 requests have no record"),
        (all_rows + label(4), merged, "records of 1 requests that are not in"),
        (all_rows + bad, merged, "have records of no row"),
        (all_rows, tmp_path / "labelled.jsonl", "is no table; name the output .parquet or .csv"),
    ]:
        result = merge_table(table, target, records)
        assert result.exit_code == 1
        assert message in result.stderr
        assert not target.exists()
        assert [*tmp_path.glob("*.records.jsonl")] == []


def test_tables_stand_where_they_belong(inputs: Path, table: Path):
    for args, message in [
        (["-i", inputs, inputs, "-o", "new.csv"], "new.csv would be a table, and"),
        (["-i", table, table, "-o", "new.csv"], "give the records of the runs"),
        (["-i", table, "-i", inputs, inputs, "-o", "new.csv"], "a table stands alone"),
    ]:
        result = CliRunner().invoke(main, ["merge", *map(str, args)])
        assert result.exit_code == 1
        assert message in result.stderr
