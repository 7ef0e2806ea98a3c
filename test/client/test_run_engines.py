"""`batchllm run` with real engines, which are killed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines import AMPLE
from pretended_server import answers_in, records_in, request
from processes import children_named
from test_run_command import COMMAND, process_of

REAL = 60


def real_command(tiny_model: Path, inputs: Path, output: Path, *more: object) -> list[str]:
    flags = ("--dtype", "float32", "--log-level", "warning", "--sleep-on-idle")
    flags += ("--max-total-tokens", AMPLE, "--served-model-name", "tiny", *more)
    flags += ("--max-running-requests", 8)  # so that they end one after the other
    args = [*COMMAND, "-i", inputs, "-o", output, "--model", tiny_model, *flags]
    return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def real_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "in.jsonl"
    start = "What the tests of a batch have in common, which is a long text. " * 4
    options = {"model": "tiny", "max_tokens": 64, "temperature": 0, "ignore_eos": True}
    lines = (request(f"r{i}", f"{start} {i % 5} {i}", **options) for i in range(REAL))
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, real_inputs: Path) -> tuple[dict, dict[str, Any]]:
    """Answers and report of a run in which nothing dies."""
    output, report = real_inputs.with_name("all.jsonl"), real_inputs.with_name("report.json")
    command = real_command(tiny_model, real_inputs, output, "--report", report)
    assert subprocess.run(command, timeout=400).returncode == 0
    return answers_in(output), json.loads(report.read_text())


def wait_for(holds: Callable[[], bool], seconds: float, process: subprocess.Popen[Any]) -> None:
    """Looks at what other processes do, which tell nobody."""
    until = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


@pytest.mark.timeout(600)
def test_each_distinct_token_is_computed_once(undisturbed: tuple[dict, dict]):
    answers, report = undisturbed
    assert len(answers) == REAL and all(answers.values())
    assert (report["done"], report["failed"], report["engine_deaths"]) == (REAL, 0, 0)
    assert report["computed_tokens"] == report["plan"]["distinct_tokens"]
    assert report["tokens_saved"] == report["plan"]["tokens_saved"] > 0
    assert report["output_tokens"] == REAL * 64


@pytest.mark.timeout(1200)
def test_it_goes_on_after_its_scheduler_and_after_itself_was_killed(
    tiny_model: Path, real_inputs: Path, undisturbed: tuple[dict, dict], tmp_path: Path
):
    output, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    command = real_command(tiny_model, real_inputs, output, "--report", report)

    def records() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    with process_of(command) as first:
        wait_for(lambda: records() >= 3, 300, first)
        running = children_named("", first.pid)
        assert len(running) >= 3
    assert not psutil.wait_procs(running, timeout=60)[1], "it leaves an engine behind"
    found = records()
    assert found < REAL

    with process_of(command) as second:
        wait_for(lambda: records() >= found + 3, 300, second)
        (scheduler,) = children_named("::scheduler", second.pid)
        scheduler.kill()
        assert second.wait(300) == 0
    answers, _ = undisturbed
    assert answers_in(output) == answers
    about = json.loads(report.read_text())
    assert (about["engine_deaths"], about["found_done"]) == (1, found)


@pytest.mark.skipif(os.environ.get("REPLICAS") != "1", reason="takes minutes; REPLICAS=1 runs it")
@pytest.mark.timeout(1200)
def test_two_replicas_lose_nothing_when_one_is_killed(
    tiny_model: Path, real_inputs: Path, undisturbed: tuple[dict, dict], tmp_path: Path
):
    inputs, output, report = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "report.json"))
    too_long = request("long", "word " * 3000, model="tiny", max_tokens=4)
    inputs.write_bytes(too_long + real_inputs.read_bytes())
    command = real_command(tiny_model, inputs, output, "--report", report, "--dp-size", 2)

    with process_of(command) as process:
        wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") > 3, 300, process)
        replicas = children_named("::scheduler", process.pid)
        assert len(replicas) == 2
        replicas[1].kill()
        assert process.wait(400) == 0
    answers = answers_in(output)
    assert not answers.pop("long")
    assert answers == undisturbed[0]
    (refused,) = (row["response"] for row in records_in(output) if row["custom_id"] == "long")
    assert refused["status_code"] == 400
    assert "context length" in json.dumps(refused["body"])
    about = json.loads(report.read_text())
    assert (about["done"], about["failed"], about["engine_deaths"]) == (REAL, 1, 1)
