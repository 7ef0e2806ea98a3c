"""Outputs of several runs in one file."""

from __future__ import annotations

from pathlib import Path

import orjson
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
