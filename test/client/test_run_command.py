"""`batchllm run` with servers that are made up; see also `test_run_engines.py`."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from pretended_server import (
    Script,
    answers_in,
    expected_answers,
    records_in,
    requests,
    serving,
)
from sglang_batchllm.client.command import main

COMMAND = [sys.executable, "-c", "from sglang_batchllm.client.command import main; main()", "run"]


def run(*args: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, args)], input=stdin)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(30))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


# What can't run is said before anything does


def refused(tmp_path: Path, *args: str) -> str:
    """The sentence, with the folder left out. Nobody answers at the url."""
    (tmp_path / "in.jsonl").write_bytes(requests(2))
    (tmp_path / "t.csv").write_text("text,n\na,1\n")
    (tmp_path / "folder").mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    in_place = [arg.replace("@", f"{tmp_path}/") for arg in args]
    result = run(*in_place)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    left = {path.name for path in sorted(tmp_path.rglob("*")) if path not in before}
    assert not {name for name in left if "engine.log" in name}
    (said,) = result.stderr.splitlines()
    return said.replace(f"{tmp_path}/", "@").replace(str(tmp_path), "@")


IN = ("-i", "@in.jsonl", "-o", "@out.jsonl")
TABLE = ("-i", "@t.csv", "-o", "@out.csv", "--url", "http://127.0.0.1:9")
URL = ("--url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (IN, "give either --model, to start an engine, or --url of a server that runs"),
        (
            (*IN, "--model", "m", *URL),
            "give either --model, to start an engine, or --url of a server that runs",
        ),
        (
            (*IN, *URL, "--tp-size", "2"),
            "--tp-size is for an engine that is started; leave it out with --url",
        ),
        (
            ("-i", "@missing", "-o", "@out.jsonl", *URL),
            "@missing is not a file; name one with requests",
        ),
        (
            ("-i", "@folder", "-o", "@out.jsonl", *URL),
            "@folder is not a file; name one with requests",
        ),
        (("-i", "@in.jsonl", "-o", "@folder", *URL), "@folder is a folder; name a file"),
        (
            ("-i", "@in.jsonl", "-o", "@no/out", *URL),
            "@no/out can't be written: there is no folder @no; make it",
        ),
        ((*IN, *URL, "--report", "@folder"), "@folder is a folder; name a file"),
        (
            (*IN, *URL, "--report", "@no/report"),
            "@no/report can't be written: there is no folder @no; make it",
        ),
        (
            (*IN, *URL, "--errors", "@no/bad"),
            "@no/bad can't be written: there is no folder @no; make it",
        ),
        (
            (*IN, *URL, "--params", "{"),
            "--params is not JSON: Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)",
        ),
        (
            (*IN, *URL, "--params", "[]"),
            "--params must be an object of JSON, such as '{\"max_tokens\": 16}'",
        ),
        (
            ("-i", "-", "-i", "@in.jsonl", "-o", "@out.jsonl", *URL),
            "-i - reads standard input, and stands alone",
        ),
        (
            (*IN, *URL, "--prompt-column", "text"),
            "@in.jsonl is no table (.parquet, .csv), so it has no columns",
        ),
        (
            (*TABLE, "--prompt-column", "text", "--errors", "@bad"),
            "--errors is for batch files; a table has a column for them",
        ),
        (TABLE, "a table needs either --prompt-column or --template"),
        (
            (*TABLE, "--prompt-column", "text", "--template", "{text}"),
            "a table needs either --prompt-column or --template",
        ),
        ((*TABLE, "--prompt-column", "txt"), "@t.csv has no column txt; it has text, n"),
        (
            (*TABLE, "--template", "{text"),
            "--template has braces that do not match (expected '}' before end of string); write "
            "columns as {name}, and a brace itself as {{ or }}",
        ),
        (
            (*TABLE, "-i", "@in.jsonl", "--prompt-column", "text"),
            "a table stands alone; run one after the other",
        ),
        (
            ("-i", "@t.csv", "-o", "@out.jsonl", *URL, "--prompt-column", "text"),
            "@out.jsonl is no table; name the output .parquet or .csv, as the input is",
        ),
        (
            ("-i", "@in.jsonl", "-o", "@in.jsonl", *URL),
            "@in.jsonl has something else than records in line 1; name another file",
        ),
    ],
)
def test_what_can_not_run_is_one_sentence(tmp_path: Path, args: tuple[str, ...], said: str):
    assert refused(tmp_path, *args) == f"error: {said}"


def test_a_server_that_does_not_run_is_said(tmp_path: Path):
    said = refused(tmp_path, *IN, *URL)
    assert said.startswith("error: http://127.0.0.1:9 does not answer: ")
    assert said.endswith("; start it, or name another one")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_said(tmp_path: Path):
    (tmp_path / "folder").mkdir(mode=0o500)
    said = refused(tmp_path, "-i", "@in.jsonl", "-o", "@folder/out", *URL)
    assert said == "error: @folder/out can't be written: permission denied; name another file"


@pytest.mark.parametrize("args", [("-o", "x"), ("-i", "x")])
def test_input_and_output_are_needed(args: tuple[str, ...]):
    assert run(*args, *URL).exit_code == 2


# With a server that runs


def test_requests_are_answered_and_reported(tmp_path: Path, inputs: Path, output: Path):
    report = tmp_path / "report.json"
    more = tmp_path / "more.jsonl"
    more.write_bytes(b"no json\n")
    with serving(Script()) as server:
        args = ("-i", inputs, "-i", more, "-o", output, "--url", server.url, "--report", report)
        result = run(*args)
        assert result.exit_code == 0, result.output
        again = run(*args)
    assert result.stdout == ""
    found = answers_in(output)
    assert found.pop(None) is None
    assert found == expected_answers(30)
    assert re.search(r"requests +30 done, 1 failed", result.stderr)
    assert "found done" not in result.stderr
    assert re.search(r"31 of them were found done", again.stderr)
    about = json.loads(report.read_text())
    assert (about["requests"], about["done"], about["failed"], about["found_done"]) == (
        31,
        30,
        1,
        31,
    )
    assert about["inputs"] == [str(inputs), str(more)]


def test_errors_may_go_elsewhere(tmp_path: Path, inputs: Path, output: Path):
    inputs.write_bytes(requests(3) + b"no json\n")
    with serving(Script()) as server:
        run("-i", inputs, "-o", output, "--errors", tmp_path / "bad", "--url", server.url)
    assert answers_in(output) == expected_answers(3)
    assert [record["error"]["line"] for record in records_in(tmp_path / "bad")] == [4]


def test_standard_input_and_output_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with serving(Script()) as server:
        result = run("-i", "-", "-o", "-", "--url", server.url, stdin=requests(5))
    assert result.exit_code == 0, result.stderr
    (tmp_path / "records").write_text(result.stdout)
    assert answers_in(tmp_path / "records") == expected_answers(5)
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


def test_params_fill_what_bodies_do_not_say(inputs: Path, output: Path):
    script = Script()
    with serving(script) as server:
        run("-i", inputs, "-o", output, "--url", server.url, "--params", '{"max_tokens": 9}')
        changed = run("-i", inputs, "-o", output, "--url", server.url)
    assert {body["max_tokens"] for body in script.bodies} == {9}
    assert "it was begun with parameters {'max_tokens': 9}, and these are {}" in changed.stderr


def test_an_api_key_comes_from_a_flag_or_the_environment(
    inputs: Path, output: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(Script(api_key="secret")) as server:
        args = ("-i", inputs, "-o", output, "--url", server.url)
        said = run(*args).stderr.splitlines()[-1]
        assert said == f"error: {server.url} wants an API key; give it with --api-key"
        assert run(*args, "--api-key", "secret").exit_code == 0
        output.unlink()
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert run(*args).exit_code == 0


def test_a_table_gets_its_answers(tmp_path: Path):
    table, output = tmp_path / "t.csv", tmp_path / "out.csv"
    table.write_text('text,n\na,1\n"b, b",2\n\u00e9,\n')
    with serving(script := Script(replies={"1: b, b": []})) as server:
        args = ("-i", table, "-o", output, "--url", server.url, "--template", "{n}: {text}")
        result = run(*args)
        assert result.exit_code == 0, result.stderr
        run(*args)  # again, from the records
    assert set(script.asked) == {"1: a", "2: b, b", ": \u00e9"}
    assert set(script.asked.values()) == {1}
    rows = [*csv.DictReader(io.StringIO(output.read_text()))]
    assert [row["answer"] for row in rows] == ["<1: a>", "<2: b, b>", "<: \u00e9>"]
    assert [row["text"] for row in rows] == ["a", "b, b", "\u00e9"]


def test_a_table_may_ask_for_completions_and_fail(tmp_path: Path):
    table, output = tmp_path / "t.csv", tmp_path / "out.parquet"
    table.write_text("text\na\nb\n")
    with serving(script := Script(replies={"b": [400]})) as server:
        args = ("--url", server.url, "--prompt-column", "text", "--endpoint", "completions")
        assert run("-i", table, "-o", output, *args).exit_code == 0
    assert all("prompt" in body for body in script.bodies)
    assert pyarrow.parquet.read_table(output).to_pydict() == {
        "text": ["a", "b"],
        "answer": ["<a>", None],
        "finish_reason": ["stop", None],
        "error": [None, "status 400"],
    }


# Ctrl-C


@contextmanager
def process_of(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Which does not outlive its test."""
    process = subprocess.Popen([*map(str, command)], **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_interrupted_run_says_how_to_go_on(inputs: Path, output: Path):
    script = Script(hold_after=10)
    with serving(script) as server:
        command = [*COMMAND, "-i", inputs, "-o", output, "--url", server.url]
        with process_of(command, stderr=subprocess.PIPE, text=True) as process:
            assert script.held.wait(60)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        done = len(answers_in(output))
        assert said.splitlines()[-2:] == [
            "stopping; once more stops at once",
            f"stopped: {done} of 30 requests have a record in {output}; the same command goes on "
            "from there",
        ]
        script.release()
        result = run("-i", inputs, "-o", output, "--url", server.url)
    assert result.exit_code == 0
    assert f"{done} of them were found done" in result.stderr or not done
    assert answers_in(output) == expected_answers(30)


def test_interrupted_twice_it_stops_at_once(inputs: Path, output: Path):
    slow = """
import asyncio
from sglang_batchllm.client.command import main
from sglang_batchllm.jobs.hosts import Running
Running.stop = lambda self: asyncio.sleep(600)
main()
"""
    script = Script(hold_after=10)
    with serving(script) as server:
        command = [sys.executable, "-c", slow, "run", "-i", inputs, "-o", output]
        command += ["--url", server.url]
        with process_of(command, stderr=subprocess.PIPE, text=True) as process:
            assert script.held.wait(60) and process.stderr is not None
            process.send_signal(signal.SIGINT)
            while "stopping" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            process.stderr.close()
    answers_in(output)
