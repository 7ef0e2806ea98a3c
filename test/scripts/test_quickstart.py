"""The quickstart's helpers, without its servers."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quickstart

STUBBORN = """#!/bin/sh
trap '' INT TERM
sleep 1000 &
echo $! $$ > {file}
while :; do sleep 1; done
"""


def test_documents_come_from_code_with_type_aliases():
    class Alias(ast.stmt):  # what `type Name = ...` is in Python 3.12
        name = ast.Name("Name")

    module = ast.parse('"""What it is."""\ndef run():\n    """It runs."""\n')
    module.body.append(Alias())
    assert list(quickstart.docstrings(module, "m")) == ["m: What it is.", "m.run: It runs."]


def test_documents_are_found_on_this_python():
    documents = quickstart.choose_documents(24)
    assert documents == quickstart.choose_documents(24)
    assert all(1200 <= len(document) <= 4000 for document in documents)


@pytest.fixture
def stubborn_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quickstart.Server:
    """A server that does not end when asked to, and has another process."""
    file, program = tmp_path / "processes", tmp_path / "python"
    program.write_text(STUBBORN.format(file=file))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    server = quickstart.Server([], tmp_path / "log")
    deadline = time.monotonic() + 10
    while not file.exists() or not file.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return server


def test_a_server_that_is_busy_is_stopped_within_two_seconds(stubborn_server, tmp_path):
    processes = (tmp_path / "processes").read_text().split()
    started = time.monotonic()
    stubborn_server.stop()
    assert time.monotonic() - started < 2
    assert quickstart.Server.running is None
    while any(map(is_running, processes)):  # a killed process may take a moment
        assert time.monotonic() - started < 4
        time.sleep(0.05)


def is_running(process: str) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in "XZ"


def test_a_server_that_ends_by_itself_is_not_waited_for(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    server = quickstart.Server([], tmp_path / "log")
    with pytest.raises(quickstart.ServerError, match="ended while starting"):
        server.wait_until_ready()
    server.stop()


def test_the_tiny_model_has_a_chat_template(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": "Hello?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user: Hello?\nassistant:"


def test_a_server_chats_with_the_tiny_model(server):
    messages = [{"role": "user", "content": "Hello?"}]
    body = {"model": "default", "messages": messages, "max_tokens": 4}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_setup_finds_only_a_python_that_is_asked_for():
    script = 'source scripts/setup.sh; find_python "$@"'
    root = Path(quickstart.__file__).parent.parent

    def find(*minors: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", script, "bash", *minors]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)

    assert find("99").returncode != 0
    found = find().stdout.strip()
    check = "import sys; print(sys.version_info[:2] in [(3, 11), (3, 12)])"
    assert subprocess.check_output([found, "-c", check], text=True).strip() == "True"
