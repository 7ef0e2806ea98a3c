"""`batchllm plan`: what a file's requests share, without an engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pretended_server import MODEL, request, requests
from sglang_batchllm.client.command import main
from tiny_model import train_tokenizer


def plan(*args: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, args)], input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(folder, [Path.__doc__ or ""], 400)
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(30))
    return path


def value_of(result: Result, name: str) -> str:
    assert result.exit_code == 0, result.output
    found = re.search(rf"^ ?{name} +(.*?) *$", result.stdout, re.MULTILINE)
    assert found is not None, result.stdout
    return found.group(1)


def test_what_is_shared_is_printed(inputs: Path, model: Path):
    result = plan("-i", inputs, "--model", model, "--served-model-name", MODEL)
    assert value_of(result, "requests") == "30"
    prompt = int(value_of(result, "prompt tokens").replace(",", ""))
    distinct = int(value_of(result, "distinct tokens").split(",")[0])
    saved = int(value_of(result, "saved").split(" ")[0])
    assert prompt == distinct + saved
    assert saved > 0
    assert int(value_of(result, "prefix groups").split(",")[0]) > 0
    assert value_of(result, "order").count(", ") == 5
    assert value_of(result, "order").endswith(", ...")


def test_a_longer_page_shares_less(inputs: Path, model: Path):
    args = ("-i", inputs, "--tokenizer", model)
    saved = [
        int(value_of(plan(*args, "--page-size", size), "saved").split(" ")[0]) for size in (1, 16)
    ]
    assert saved[0] > saved[1]


def test_rows_that_can_not_run_are_said(inputs: Path, model: Path):
    inputs.write_bytes(requests(3) + b"no json\n{}\n")
    result = plan("-i", inputs, "--tokenizer", model)
    assert value_of(result, "requests") == "3"
    assert "2 rows can't run: line 4: the line is not JSON" in result.stdout


def test_a_page_is_written(inputs: Path, model: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    assert plan("-i", inputs, "--tokenizer", model, "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "topic" in text and "r29" in text and str(inputs) in text


def test_a_table_and_standard_input_do(tmp_path: Path, model: Path):
    table = tmp_path / "t.csv"
    table.write_text("text\na\nb\n")
    before = sorted(tmp_path.iterdir())
    args = ("-i", table, "--tokenizer", model, "--template", "Of this: {text}")
    assert value_of(plan(*args), "requests") == "2"
    assert value_of(plan("-i", "-", "--tokenizer", model, stdin=requests(4)), "requests") == "4"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give --model, whose tokenizer and chat template the plan is made with"),
        (
            ("--model", "@nothing"),
            "@nothing has no tokenizer that can be loaded",
        ),
        (
            ("--model", "@model", "--served-model-name", "other"),
            '@in.jsonl: no request can run: line 1: model is "pretended"; served is other',
        ),
        (("--tokenizer", "@model", "--html", "@model"), "@model is a folder; name a file"),
        (
            ("--tokenizer", "@model", "--html", "@no/page"),
            "@no/page can't be written: there is no folder @no; make it",
        ),
        (
            ("--tokenizer", "@model", "--prompt-column", "text"),
            "@in.jsonl is no table (.parquet, .csv), so it has no columns",
        ),
        (("--tokenizer", "@model", "-i", "@no"), "@no is not a file; name one with requests"),
        (
            ("--tokenizer", "@model", "-i", "-"),
            "-i - reads standard input, and stands alone",
        ),
    ],
)
def test_what_can_not_be_planned_is_one_sentence(
    tmp_path: Path, model: Path, args: tuple[str, ...], said: str
):
    (tmp_path / "in.jsonl").write_bytes(request("r0"))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "model").symlink_to(model)
    in_place = [arg.replace("@", f"{tmp_path}/") for arg in args]
    result = plan("-i", tmp_path / "in.jsonl", *in_place)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.replace(f"{tmp_path}/", "@") == f"error: {said}\n"


def test_a_file_without_requests_is_said(tmp_path: Path, model: Path):
    (tmp_path / "in.jsonl").write_bytes(b"\n")
    result = plan("-i", tmp_path / "in.jsonl", "--tokenizer", model)
    said = "no request can run: it has no requests"
    assert result.stderr == f"error: {tmp_path / 'in.jsonl'}: {said}\n"


def test_shards_have_every_line_once(inputs: Path, model: Path, tmp_path: Path):
    lines = [*requests(30).splitlines(), b"no json", b"", b"{}"]
    inputs.write_bytes(b"\n".join(lines))
    folder = tmp_path / "shards"
    args = ("-i", inputs, "--tokenizer", model, "--shards", 3, "--into", folder)
    result = plan(*args)
    assert value_of(result, "shards").startswith("3, the longest ")
    assert int(value_of(result, "computed twice").split(" ")[0].replace(",", "")) >= 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"000{shard}-of-0003.jsonl" for shard in (1, 2, 3)]
    found = [(folder / name).read_bytes().splitlines() for name in names]
    assert sorted(line for shard in found for line in shard) == sorted(filter(None, lines))
    assert {b"no json", b"{}"} <= set(found[0])
    assert all(5 <= len(shard) <= 17 for shard in found)
    for shard in found:  # in the order of the file
        places = [lines.index(line) for line in shard]
        assert places == sorted(places)

    again = plan(*args)
    assert again.exit_code == 1
    assert "0001-of-0003.jsonl is there already" in again.stderr


@pytest.mark.parametrize("args", [("--shards", 2), ("--into", "somewhere")])
def test_shards_need_a_folder(inputs: Path, model: Path, args: tuple[object, ...]):
    result = plan("-i", inputs, "--tokenizer", model, *args)
    assert result.exit_code == 1
    assert "--shards and --into go together" in result.stderr
