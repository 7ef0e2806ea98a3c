"""Tables as batch files, and answers as their new columns."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.jobs.errors import JobError, RowError
from sglang_batchllm.jobs.records import Answer, answer_record, error_record
from sglang_batchllm.jobs.table import Prompts, check_output, write_answers, write_requests
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS

ROWS = {
    "text": ["plain", None, "", "\u00e9\u4e2d \U0001d11e", 'quo"te, {text}\nnext'],
    "number": [1, 2, None, -4, 5],
    "a b": ["x", "y", "z", None, "w"],
}


def parquet(folder: Path, columns: dict[str, Any] = ROWS) -> Path:
    path = folder / "in.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def csv(folder: Path, text: str) -> Path:
    path = folder / "in.csv"
    path.write_text(text, encoding="utf-8")
    return path


def prompts_of(table: Path, prompts: Prompts, url: str = CHAT) -> list[str]:
    """Of the batch file that it becomes; each row has its number."""
    requests = table.with_name("requests.jsonl")
    write_requests(table, prompts, url, requests)
    lines = [json.loads(line) for line in requests.read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == [str(i) for i in range(len(lines))]
    assert {(line["method"], line["url"]) for line in lines} <= {("POST", url)}
    if url == COMPLETIONS:
        return [line["body"]["prompt"] for line in lines]
    assert all(len(line["body"]["messages"]) == 1 for line in lines)
    return [line["body"]["messages"][0]["content"] for line in lines]


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_a_column_is_the_prompt(tmp_path: Path, url: str):
    table = parquet(tmp_path)
    assert prompts_of(table, Prompts("text"), url) == [text or "" for text in ROWS["text"]]
    assert prompts_of(table, Prompts("number"), url) == ["1", "2", "", "-4", "5"]


@pytest.mark.parametrize(
    ("template", "first", "third"),
    [
        ("{text}", "plain", ""),
        ("{a b}: {number}/{number}", "x: 1/1", "z: /"),
        ('{{"text": "{text}"}}', '{"text": "plain"}', '{"text": ""}'),
        ("no column", "no column", "no column"),
        ("", "", ""),
    ],
)
def test_a_template_is_filled_with_columns(tmp_path: Path, template: str, first: str, third: str):
    filled = prompts_of(parquet(tmp_path), Prompts(template=template))
    assert (filled[0], filled[2]) == (first, third)


def test_what_a_cell_holds_is_no_template(tmp_path: Path):
    assert prompts_of(parquet(tmp_path), Prompts(template="<{text}>"))[4] == f"<{ROWS['text'][4]}>"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{text", "--template has braces that do not match (expected '}' before end of string); "),
        ("text}", "--template has braces that do not match (Single '}' encountered in format "
         "string); "),
        ("{}", "--template has {...}; "),
        ("{text!r}", "--template has {text...}; "),
        ("{number:>5}", "--template has {number...}; "),
    ],
)  # fmt: skip
def test_a_template_that_is_none_is_said(tmp_path: Path, template: str, told: str):
    with pytest.raises(JobError) as caught:
        prompts_of(parquet(tmp_path), Prompts(template=template))
    assert str(caught.value) == told + "write columns as {name}, and a brace itself as {{ or }}"


@pytest.mark.parametrize("options", [{}, {"column": "a", "template": "b"}])
def test_one_of_column_and_template_is_needed(options: dict[str, str]):
    with pytest.raises(JobError, match="a table needs either --prompt-column or --template"):
        Prompts(**options)


@pytest.mark.parametrize("prompts", [Prompts("txt"), Prompts(template="{text} {txt}")])
def test_a_missing_column_is_named(tmp_path: Path, prompts: Prompts):
    table = parquet(tmp_path)
    with pytest.raises(JobError) as caught:
        prompts_of(table, prompts)
    assert str(caught.value) == f"{table} has no column txt; it has text, number, a b"


@pytest.mark.parametrize("name", ["answer", "finish_reason", "error"])
def test_a_column_that_the_answers_get_is_refused(tmp_path: Path, name: str):
    table = csv(tmp_path, f"text,{name}\na,b\n")
    with pytest.raises(JobError) as caught:
        prompts_of(table, Prompts("text"))
    told = f"has a column {name}, which the answers get; rename it"
    assert str(caught.value) == f"{table} {told}"


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    table = csv(tmp_path, "text,text\na,b\n")
    with pytest.raises(JobError) as caught:
        prompts_of(table, Prompts("text"))
    assert str(caught.value) == f"{table} has two columns text; rename one"


@pytest.mark.parametrize(
    ("name", "content"),
    [("in.parquet", b"text"), ("in.csv", b""), ("in.csv", b"a,b\n1,2,3\n")],
)
def test_what_is_no_table_is_said(tmp_path: Path, name: str, content: bytes):
    table = tmp_path / name
    table.write_bytes(content)
    with pytest.raises(JobError, match=f"{name} can't be read: "):
        prompts_of(table, Prompts("a"))


def answered(number: int, text: str | None, reason: str = "stop") -> bytes:
    message = {"message": {"role": "assistant", "content": text}}
    return answer_record(
        str(number), Answer(200, {"choices": [{**message, "finish_reason": reason}]})
    )


RECORDS = [  # as they finished, one row having none
    answered(3, '\u00e9\n,"'),
    answer_record("1", Answer(400, {"error": {"message": "too long"}})),
    error_record(3, RowError("engine_died", "it died", "2")),
    answer_record("0", Answer(200, {"choices": [{"text": "t", "finish_reason": "length"}]})),
]
ANSWERS = {
    "answer": ["t", None, None, '\u00e9\n,"', None],
    "finish_reason": ["length", None, None, "stop", None],
    "error": [None, "too long", "it died", None, None],
}


def test_answers_are_columns_of_a_parquet_table(tmp_path: Path):
    table, records, output = parquet(tmp_path), tmp_path / "records", tmp_path / "out.parquet"
    records.write_bytes(b"".join(RECORDS))
    write_answers(table, records, output)
    assert pyarrow.parquet.read_table(output).to_pydict() == {**ROWS, **ANSWERS}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.parquet",
        "out.parquet",
        "records",
    ]


def test_answers_are_columns_of_a_csv_table(tmp_path: Path):
    table = csv(tmp_path, 'text,number\nplain,1\n,2\n"",\n\u00e9,-4\n"quo""te, x",5\n')
    records, output = tmp_path / "records", tmp_path / "out.csv"
    records.write_bytes(b"".join(RECORDS))
    write_answers(table, records, output)
    options = pyarrow.csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    found = pyarrow.csv.read_csv(output, parse_options=parsing, convert_options=options).to_pydict()
    assert found.pop("text") == ["plain", "", "", "\u00e9", 'quo"te, x']
    assert found.pop("number") == [1, 2, None, -4, 5]
    assert found == ANSWERS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"error": {"message": "it broke"}}, "it broke"),
        ({"object": "error", "message": "it broke"}, "it broke"),
        ({"error": "it broke"}, "it broke"),
        ("it broke", "it broke"),
        ({"detail": "no"}, '{"detail":"no"}'),
        ({"error": {"code": 5}}, '{"error":{"code":5}}'),
        ({"error": None}, '{"error":null}'),
        ([], "[]"),
    ],
)
def test_any_error_of_a_server_has_a_text(tmp_path: Path, content: Any, told: str):
    table = parquet(tmp_path, {"text": ["a"]})
    (tmp_path / "records").write_bytes(answer_record("0", Answer(500, content)))
    write_answers(table, tmp_path / "records", tmp_path / "out.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert (found["answer"], found["error"]) == ([None], [told])


CELLS = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=5))


@given(st.lists(st.tuples(CELLS, st.none() | st.integers(-9, 9)), max_size=12), st.randoms())
def test_every_row_keeps_its_cells_and_gets_its_own_answer(rows: list, random: Any):
    schema = pa.schema([("text", pa.string()), ("number", pa.int64())])
    columns = {"text": [row[0] for row in rows], "number": [row[1] for row in rows]}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.parquet"
        table = pa.table(columns, schema=schema)
        pyarrow.parquet.write_table(table, path, row_group_size=3)
        prompts = prompts_of(path, Prompts("text"))
        assert prompts == [row[0] or "" for row in rows]
        records = [answered(i, f"<{prompt}>") for i, prompt in enumerate(prompts)]
        random.shuffle(records)
        (Path(folder) / "records").write_bytes(b"".join(records))
        output = Path(folder) / "out.parquet"
        write_answers(path, Path(folder) / "records", output)
        found = pyarrow.parquet.read_table(output)
    assert found.select(["text", "number"]) == table
    assert found["answer"].to_pylist() == [f"<{prompt}>" for prompt in prompts]
    assert found["error"].null_count == found["error"].length()


def test_a_csv_can_not_hold_lists(tmp_path: Path):
    table = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a"], "tags": [["b"]]}), table)
    check_output(table, tmp_path / "out.parquet")
    with pytest.raises(JobError, match=r"out\.csv can't hold column tags of .*name the output"):
        check_output(table, tmp_path / "out.csv")
