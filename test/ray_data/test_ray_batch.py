"""The example of Ray Data on two CPU replicas: real engines, one of which is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest

from engines import CONTEXT_LENGTH
from pretended_server import request

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"
OUTPUT_LEN = 16
ROWS = 80
MORE = 40
TEXT = "What the requests of a document have in common, which is long, about number {0}. " * 8


def write_rows(path: Path, count: int) -> None:
    """One of them is longer than the model's context."""
    texts = [f"{TEXT.format(i % 8)} {i}" for i in range(count)]
    texts[7] = "and on " * (CONTEXT_LENGTH // 2 + 100)
    path.write_bytes(b"".join(request(f"r{i}", text) for i, text in enumerate(texts)))


def command(model: Path, folder: Path, *more: object) -> list[str]:
    args = ("--model", model, "--input", folder / "in.jsonl", "--out", folder / "out")
    args += ("--num-gpus", 0, "--max-tokens", OUTPUT_LEN, *more)
    return [sys.executable, str(EXAMPLE), *map(str, args)]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    files = (folder / "out" / "records").glob("*.parquet")
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    by_id = {row["custom_id"]: row for row in rows}
    assert len(by_id) == len(rows), "two records of one row"
    return by_id


def assert_right(found: dict[str, dict[str, Any]], count: int, engine: Any) -> None:
    """As one engine answers the same prompts."""
    assert found.keys() == {f"r{i}" for i in range(count)}
    assert "context length" in found.pop("r7")["__inference_error__"]
    done = [*found.values()]
    assert not any(row["__inference_error__"] for row in done)
    expected = engine.generate(
        input_ids=[row["prompt_token_ids"] for row in done],
        sampling_params={"temperature": 0, "max_new_tokens": OUTPUT_LEN},
    )
    assert [row["generated_text"] for row in done] == [result["text"] for result in expected]


def replicas(process: subprocess.Popen[Any]) -> Sequence[psutil.Process]:
    """The actors, each of which has a scheduler."""
    children = psutil.Process(process.pid).children(recursive=True)
    actors = [one.parent() for one in children if "sglang::scheduler" in " ".join(one.cmdline())]
    return [actor for actor in actors if actor is not None]


@pytest.mark.timeout(1200)
def test_two_replicas_answer_as_one_engine_and_go_on_after_one_was_killed(
    tiny_model: Path, tmp_path: Path, stock_engine: Any
):
    write_rows(tmp_path / "in.jsonl", ROWS)
    first = subprocess.run(
        command(tiny_model, tmp_path), capture_output=True, text=True, timeout=500
    )
    assert first.returncode == 0, first.stderr[-4000:]
    facts = json.loads(first.stdout.splitlines()[-1])
    print(f"\n{facts}")
    assert (facts["records"], facts["failed"], facts["partitions"]) == (ROWS, 1, 2)
    # A replica that has started and answered before the other has both, and repeats nothing.
    distinct, repeated = facts["distinct_tokens"], facts["repeated_by_partitions"]
    assert distinct <= facts["computed_tokens"] <= repeated + 1.01 * distinct
    before = records(tmp_path)
    assert_right(dict(before), ROWS, stock_engine)

    write_rows(tmp_path / "in.jsonl", ROWS + MORE)
    written = len([*(tmp_path / "out" / "records").iterdir()])
    with subprocess.Popen(command(tiny_model, tmp_path, "--window", 10)) as second:
        try:
            until = time.monotonic() + 400
            while len([*(tmp_path / "out" / "records").iterdir()]) == written:
                assert second.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            killed = replicas(second)[0]
            killed.kill()
            assert second.wait(400) == 0
        finally:
            second.kill()
    after = records(tmp_path)
    assert all(after[name] == row for name, row in before.items()), "done rows were run again"
    assert_right(after, ROWS + MORE, stock_engine)
