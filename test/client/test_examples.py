"""The example programs, as a user starts them, on a real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engines import API_KEY

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "rows", "field"),
    [("document_questions.py", 12, "answer"), ("rubric_judge.py", 4, "grade")],
)
def test_example(server, tmp_path, name, rows, field):
    command = [sys.executable, str(EXAMPLES / name), "--url", server.url, "--api-key", API_KEY]
    run = subprocess.run([*command, "--max-tokens", "8"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == rows
    assert all(field in line for line in lines), lines
    assert "tokens computed" in run.stderr


def test_an_example_reads_its_own_data(server, tmp_path):
    documents, questions = tmp_path / "documents.jsonl", tmp_path / "questions.jsonl"
    documents.write_text('{"id": "a", "text": "One."}\n{"id": "b", "text": "Two."}\n')
    questions.write_text('{"question": "Which?"}\n')
    command = [sys.executable, str(EXAMPLES / "document_questions.py"), "--url", server.url]
    command += ["--api-key", API_KEY, "--max-tokens", "4"]
    command += ["--documents", str(documents), "--questions", str(questions)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert [json.loads(line)["id"] for line in run.stdout.splitlines()] == ["a", "b"], run.stderr
