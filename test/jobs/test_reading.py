"""Inputs to an index: every row once, the same on any number of cores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pretended_server import request, requests
from sglang_batchllm.jobs import blocks, reading, rows
from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.index import Index
from sglang_batchllm.jobs.inputs import Inputs
from sglang_batchllm.jobs.reading import Reading, read_inputs
from sglang_batchllm.jobs.rows import Rules
from sglang_batchllm.wire.lines import COMPLETIONS

RULES = Rules(models=["pretended"])


def read(paths: list[Path], folder: Path) -> tuple[Index, str]:
    return read_inputs(paths, Reading(RULES), folder / "ids")


def write_inputs(folder: Path) -> list[Path]:
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    paths[0].write_bytes(requests(300) + b"no json\n\n" + request("\u00e9", max_tokens=7) + b"{}\n")
    paths[1].write_bytes(requests(200, COMPLETIONS) + request("x" * 9000) + request("last")[:-1])
    return paths


def test_processes_read_as_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = write_inputs(tmp_path)
    (tmp_path / "alone").mkdir()
    alone, _ = read(paths, tmp_path / "alone")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(reading, "ALONE_BYTES", 1 << 12)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    told: list[int] = []
    spread, _ = read_inputs(paths, Reading(RULES), tmp_path / "ids", told.append)
    assert (spread.places == alone.places).all()
    assert (spread.table().tokens == alone.table().tokens).all()
    assert spread.unit == alone.unit == "bytes"
    assert [(bad.file, bad.line, str(bad.error)) for bad in spread.bad] == [
        (bad.file, bad.line, str(bad.error)) for bad in alone.bad
    ]
    assert told == sorted(told) and told[-1] == len(alone) + len(alone.bad)


def test_the_index_says_where_each_row_is(tmp_path: Path):
    paths = write_inputs(tmp_path)
    index, _ = read(paths, tmp_path)
    inputs = Inputs(paths, index, RULES)
    names = [inputs.read(row).custom_id for row in range(len(index))]
    firsts = [f"r{i}" for i in range(300)]
    assert names == [*firsts, "\u00e9", *firsts[:200], "x" * 9000, "last"]
    assert inputs.place(300) == (0, 303)
    assert inputs.place(301) == (1, 1)
    assert index.places["output"][300] == 7
    assert [(bad.file, bad.line) for bad in index.bad] == [(0, 301), (0, 304)]
    inputs.close()


def test_the_digest_is_of_all_bytes(tmp_path: Path):
    paths = write_inputs(tmp_path)
    _, before = read(paths, tmp_path)
    assert read(paths, tmp_path)[1] == before
    found = {before}
    data = paths[0].read_bytes()
    for changed in (data + b"\n", data.replace(b"question 7", b"question 8"), data[:-1]):
        paths[0].write_bytes(changed)
        found.add(read(paths, tmp_path)[1])
    paths[0].write_bytes(data)
    found.add(read(paths[::-1], tmp_path)[1])
    assert len(found) == 5


def test_a_block_may_hold_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (blocks, rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 500)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    path = tmp_path / "in.jsonl"
    long = request("b", "x" * 1000)
    path.write_bytes(request("a") + long + b"\n" * 300 + b"[]\n" * 50 + request("c"))
    index, _ = read([path], tmp_path)
    assert index.places["line"].tolist() == [1, 353]
    assert len(index.bad) == 51
    told = f"the line has {len(long) - 1} bytes; a request has at most 500"
    assert (index.bad[0].line, str(index.bad[0].error)) == (2, told)


def test_an_empty_input_has_no_rows(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n \n")
    index, _ = read([path], tmp_path)
    assert len(index) == len(index.table().tokens) == 0


def test_rows_of_other_weights_or_salts_are_in_other_spaces(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    bodies = [{}, {"model": "pretended:lora"}, {"cache_salt": "s"}, {"lora_path": "l"}, {}]
    path.write_bytes(b"".join(request(str(i), "same", **body) for i, body in enumerate(bodies)))
    spaces = read([path], tmp_path)[0].places["space"]
    assert len(np.unique(spaces)) == 4
    assert spaces[0] == spaces[4]


@pytest.mark.parametrize("to", [b"\n", b'"r2"'])
def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path: Path, to: bytes):
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(5))
    index, _ = read([path], tmp_path)
    inputs = Inputs([path], index, RULES)
    path.write_bytes(requests(5).replace(b'"r3"', to))
    with pytest.raises(JobError) as caught:
        inputs.read(3)
    inputs.close()
    told = "changes while it is read; leave it alone, and run the same command again"
    assert str(caught.value) == f"{path} {told}"
