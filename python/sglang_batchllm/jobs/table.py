"""Tables (.parquet, .csv) as batch files, and answers as their new columns."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.wire.lines import CHAT

SUFFIXES = (".csv", ".parquet")
BATCH_ROWS = 4096

COLUMNS = {"answer": pa.string(), "finish_reason": pa.string(), "error": pa.string()}
"""That a table gets. answer: the text, null where the request failed."""


def is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Prompts:
    """How a row becomes a prompt: the text of one column, or a template with columns in braces."""

    column: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if (self.column is None) == (self.template is None):
            raise JobError("a table needs either --prompt-column or --template")

    def columns(self) -> list[str]:
        if self.column is not None:
            return [self.column]
        try:
            parts = [*string.Formatter().parse(self.template or "")]
        except ValueError as error:
            raise JobError(
                f"--template has braces that do not match ({error}); {_BRACES}"
            ) from None
        for _, name, format_spec, conversion in parts:
            if name is not None and (not name or format_spec or conversion):
                raise JobError(f"--template has {{{name}...}}; {_BRACES}")
        return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))

    def of(self, row: dict[str, Any]) -> str:
        if self.column is not None:
            return _text(row[self.column])
        filled = []
        for literal, name, _, _ in string.Formatter().parse(self.template or ""):
            filled.append(literal)
            if name is not None:
                filled.append(_text(row[name]))
        return "".join(filled)


_BRACES = "write columns as {name}, and a brace itself as {{ or }}"


def write_requests(table: Path, prompts: Prompts, url: str, requests: Path) -> None:
    """The table as a batch file: a request for each row, its custom_id the row's number from 0.

    Raises JobError where the table can't be read or lacks a column.
    """
    names = _schema(table).names
    missing = [name for name in prompts.columns() if name not in names]
    taken = [name for name in COLUMNS if name in names]
    if missing:
        raise JobError(f"{table} has no column {missing[0]}; it has {', '.join(names)}")
    if taken:
        raise JobError(f"{table} has a column {taken[0]}, which the answers get; rename it")
    for name in prompts.columns():
        if names.count(name) > 1:
            raise JobError(f"{table} has two columns {name}; rename one")
    number = 0
    with requests.open("wb") as out:
        for batch in _batches(table):
            for row in batch.select(prompts.columns()).to_pylist():
                prompt = prompts.of(row)
                asked = (
                    {"messages": [{"role": "user", "content": prompt}]}
                    if url == CHAT
                    else {"prompt": prompt}
                )
                line = {"custom_id": str(number), "method": "POST", "url": url, "body": asked}
                out.write(orjson.dumps(line) + b"\n")
                number += 1


def count_rows(table: Path) -> int:
    """Raises JobError where the table can't be read."""
    return sum(len(batch) for batch in _batches(table))


def check_output(table: Path, output: Path) -> None:
    """Raises JobError where a table with these columns can't be written."""
    if not is_table(output):
        raise JobError(f"{output} is no table; name the output .parquet or .csv, as the input is")
    nested = [field.name for field in _schema(table) if pa.types.is_nested(field.type)]
    if nested and output.suffix.lower() == ".csv":
        raise JobError(
            f"{output} can't hold column {nested[0]} of {table}, which has lists or fields of its "
            "own; name the output .parquet"
        )


def write_answers(table: Path, records: Path, output: Path) -> None:
    """The table with `COLUMNS`, from the records of its rows; at once and whole."""
    schema = _schema(table)
    for name, kind in COLUMNS.items():
        schema = schema.append(pa.field(name, kind))
    places = np.full(count_rows(table), -1, np.int64)
    unfinished = output.with_name(output.name + ".new")
    with records.open("rb") as lines, _writer(output)(unfinished, schema) as writer:
        offset = 0
        for line in lines:
            places[int(orjson.loads(line)["custom_id"])] = offset
            offset += len(line)
        first = 0
        for batch in _batches(table):
            found = []
            for offset in places[first : first + len(batch)].tolist():
                lines.seek(max(offset, 0))
                found.append(_answer(orjson.loads(lines.readline())) if offset >= 0 else {})
            first += len(batch)
            columns = [
                *batch.columns,
                *(
                    pa.array([one.get(name) for one in found], kind)
                    for name, kind in COLUMNS.items()
                ),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    unfinished.replace(output)


def _answer(record: dict[str, Any]) -> dict[str, str | None]:
    error, response = record["error"], record["response"]
    if error is not None:
        return {"error": error["message"]}
    body = response["body"]
    # A page of a proxy may have status 200, too.
    if response["status_code"] != 200 or not (isinstance(body, dict) and body.get("choices")):
        told = body.get("error", body) if isinstance(body, dict) else body
        message = told.get("message") if isinstance(told, dict) else told
        return {"error": _text(message) or _text(body)}
    choice = body["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return {"answer": text, "finish_reason": choice.get("finish_reason")}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else orjson.dumps(value, default=str).decode()


def _schema(table: Path) -> pa.Schema:
    with _naming(table):
        if table.suffix.lower() == ".csv":
            with pyarrow.csv.open_csv(table) as reader:
                return reader.schema
        return pyarrow.parquet.read_schema(table)


def _batches(table: Path) -> Iterator[pa.RecordBatch]:
    with _naming(table):
        if table.suffix.lower() == ".csv":
            with pyarrow.csv.open_csv(table) as reader:
                yield from reader
        else:
            with pyarrow.parquet.ParquetFile(table) as file:
                yield from file.iter_batches(BATCH_ROWS)


def _writer(output: Path) -> Callable[[Path, pa.Schema], Any]:
    if output.suffix.lower() == ".csv":
        return pyarrow.csv.CSVWriter
    return pyarrow.parquet.ParquetWriter


@contextmanager
def _naming(table: Path) -> Iterator[None]:
    """Says which table it is that can't be read."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{table} can't be read: {error}") from None
