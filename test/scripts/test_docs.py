"""What the documents show runs as shown, and what they link to is there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quickstart
from engines import API_KEY, Server

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.S))
]
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
URL = 'RuntimeEndpoint("http://127.0.0.1:30000"'
CLIENT = 'OpenAI(base_url="http://127.0.0.1:30000/v1", api_key="none"'


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs_as_a_script(
    code: str, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if URL in code:
        server: Server = request.getfixturevalue("server")
        code = code.replace(URL, f'RuntimeEndpoint("{server.url}", api_key="{API_KEY}"')
    if CLIENT in code:
        server = request.getfixturevalue("server")
        code = code.replace(CLIENT, f'OpenAI(base_url="{server.url}/v1", api_key="{API_KEY}"')
    # The tiny model's KV cache would be as large as a real one's, and take long to fill with zeros.
    code = code.replace("batchllm=True", "batchllm=True, max_total_tokens=4096")
    script = tmp_path / "snippet.py"
    script.write_text(code.replace(MODEL, str(tiny_model)))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, heading = target.partition("#")
        if not path.startswith("http"):
            linked = (document.parent / path).resolve() if path else document
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if heading else []
            assert not heading or heading in [h.lower().replace(" ", "-") for h in headings]


def test_the_first_example_of_the_readme_runs(tmp_path: Path):
    run, plan = re.findall(
        r"^\.venv/bin/(batchllm .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    model = str(quickstart.tiny_model())
    for command in (run, plan):
        words = command.replace(".quickstart/tiny-chat-llama", model).split()
        words[0] = str(Path(sys.executable).with_name("batchllm"))
        words[words.index("-i") + 1] = str(ROOT / words[words.index("-i") + 1])
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    rows = [json.loads(line) for line in (ROOT / "examples/tickets.jsonl").open()]
    assert {record["custom_id"] for record in records} == {row["custom_id"] for row in rows}
    assert all(record["response"]["status_code"] == 200 for record in records)
    assert "Ticket" in (tmp_path / "plan.html").read_text()
