"""The example of Ray Data on two CPU replicas: real engines, one of which is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest

from engines import CONTEXT_LENGTH
from pretended_server import request

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"
ROWS = 80
OUTPUT_LEN = 16
MORE = 80
LONG_OUTPUT_LEN = 200
"""Of those that come later, so that a partition of them takes seconds."""
WINDOW = 10
TEXT = "What the requests of a document have in common, which is long, about number {0}. " * 8


def write_rows(path: Path, count: int) -> None:
    """One of them is longer than the model's context."""
    texts = [f"{TEXT.format(i % 8)} {i}" for i in range(count)]
    texts[7] = "and on " * (CONTEXT_LENGTH // 2 + 100)
    path.write_bytes(b"".join(request(f"r{i}", text) for i, text in enumerate(texts)))


def command(model: Path, folder: Path, output_len: int, *more: object) -> list[str]:
    args = ("--model", model, "--input", folder / "in.jsonl", "--out", folder / "out")
    args += ("--num-gpus", 0, "--max-tokens", output_len, *more)
    return [sys.executable, str(EXAMPLE), *map(str, args)]


def rows_done(folder: Path) -> int:
    """While the example runs: rows that would not be run again."""
    files = (folder / "out" / "checkpoint").glob("*.parquet")
    done = [file for file in files if not file.name.endswith(".pending.parquet")]
    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in done)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    files = (folder / "out" / "records").glob("*.parquet")
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    by_id = {row["custom_id"]: row for row in rows}
    assert len(by_id) == len(rows), "two records of one row"
    return by_id


def assert_right(found: dict[str, dict[str, Any]], count: int, engine: Any) -> None:
    """As one engine answers the same prompts."""
    assert found.keys() == {f"r{i}" for i in range(count)}
    assert "context length" in found["r7"]["__inference_error__"]
    done = [found[f"r{i}"] for i in range(count) if i != 7]
    assert not any(row["__inference_error__"] for row in done)
    lengths = [OUTPUT_LEN] * (ROWS - 1) + [LONG_OUTPUT_LEN] * (count - ROWS)
    expected = engine.generate(
        input_ids=[row["prompt_token_ids"] for row in done],
        sampling_params=[{"temperature": 0, "max_new_tokens": length} for length in lengths],
    )
    assert [row["generated_text"] for row in done] == [result["text"] for result in expected]


def a_replica(process: subprocess.Popen[Any]) -> psutil.Process:
    """One of the actors, each of which has started a scheduler."""
    mine = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    for found in psutil.process_iter(["ppid", "cmdline"]):
        name = " ".join(found.info["cmdline"] or ())
        if "sglang::scheduler" in name and found.info["ppid"] in mine:
            return psutil.Process(found.info["ppid"])
    raise AssertionError("no replica runs")


@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("RAY") != "1", reason="takes minutes; RAY=1 runs it")
def test_two_replicas_answer_as_one_engine_and_go_on_after_one_was_killed(
    tiny_model: Path, tmp_path: Path, stock_engine: Any
):
    write_rows(tmp_path / "in.jsonl", ROWS)
    first = subprocess.run(
        command(tiny_model, tmp_path, OUTPUT_LEN), capture_output=True, text=True, timeout=500
    )
    assert first.returncode == 0, first.stderr[-4000:]
    facts = json.loads(first.stdout.splitlines()[-1])
    print(f"\n{facts}")
    assert (facts["records"], facts["failed"], facts["partitions"]) == (ROWS, 1, 2)
    # A replica that has started and answered before the other has both, and repeats nothing.
    distinct, repeated = facts["distinct_tokens"], facts["repeated_by_partitions"]
    assert distinct <= facts["computed_tokens"] <= repeated + 1.01 * distinct
    before = records(tmp_path)
    assert_right(before, ROWS, stock_engine)

    write_rows(tmp_path / "in.jsonl", ROWS + MORE)
    assert rows_done(tmp_path) == ROWS
    more = command(tiny_model, tmp_path, LONG_OUTPUT_LEN, "--window", WINDOW)
    log = tmp_path / "second.log"
    with log.open("w") as out, subprocess.Popen(more, stdout=out, stderr=out) as second:
        try:
            until = time.monotonic() + 400
            while rows_done(tmp_path) == ROWS:
                assert second.poll() is None and time.monotonic() < until
                time.sleep(0.05)
            a_replica(second).kill()
            done = rows_done(tmp_path)
            assert second.wait(500) == 0, log.read_text()[-4000:]
        finally:
            second.kill()
    print(f"killed with {done - ROWS} of {MORE} rows done")
    assert "killed while executing a task" in log.read_text(), "it was killed before or after"
    after = records(tmp_path)
    assert all(after[name] == row for name, row in before.items()), "done rows were run again"
    assert_right(after, ROWS + MORE, stock_engine)
