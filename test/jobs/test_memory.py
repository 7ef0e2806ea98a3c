"""What a job remembers beside its records, and what it names when something has changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.memory import Identity, Memory
from sglang_batchllm.jobs.model import model_identity

IDENTITY = Identity(["in.jsonl"], "00", {"name": "m", "files": "12"}, {"max_tokens": 5})


def saved(output: Path, **suspects: int) -> Memory:
    memory = Memory.beside(output)
    memory.check(IDENTITY, output, has_records=False)
    memory.suspects = {int(row[1:]): times for row, times in suspects.items()}
    memory.alone = {row: 1 for row in memory.suspects}
    memory.save()
    return memory


def test_what_is_saved_is_read_again(tmp_path: Path):
    output = tmp_path / "out.jsonl"
    saved(output, r5=2, r7=1)
    again = Memory.beside(output)
    assert (again.identity, again.suspects) == (IDENTITY, {5: 2, 7: 1})
    assert again.alone == {5: 1, 7: 1}
    again.check(IDENTITY, output, has_records=True)
    assert again.suspects == {5: 2, 7: 1}
    assert os.listdir(tmp_path) == ["out.jsonl.batchllm"]


def test_inputs_may_have_other_names(tmp_path: Path):
    output = tmp_path / "out"
    saved(output)
    Memory.beside(output).check(replace(IDENTITY, inputs=["moved"]), output, has_records=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"digest": "01"}, "the input has changed since then"),
        (
            {"model": {"name": "n", "files": None}},
            "it was begun with model m 12, and this is n",
        ),
        (
            {"model": {"name": "m", "files": "13"}},
            "it was begun with model m 12, and this is m 13",
        ),
        (
            {"params": {}},
            "it was begun with parameters {'max_tokens': 5}, and these are {}",
        ),
    ],
)
def test_what_has_changed_is_named(tmp_path: Path, change: dict, told: str):
    output = tmp_path / "out"
    saved(output, r5=1)
    changed = replace(IDENTITY, **change)
    with pytest.raises(JobError) as caught:
        Memory.beside(output).check(changed, output, has_records=True)
    assert str(caught.value) == (
        f"{output} belongs to another job: {told}; name another output, or delete {output} and "
        f"{output}.batchllm"
    )
    memory = Memory.beside(output)
    memory.check(changed, output, has_records=False)  # nothing to mix with
    assert (memory.identity, memory.suspects, memory.alone) == (changed, {}, {})


def test_records_of_another_tool_are_refused(tmp_path: Path):
    output = tmp_path / "out"
    with pytest.raises(JobError) as caught:
        Memory.beside(output).check(IDENTITY, output, has_records=True)
    told = "has records, but none of a run like this; name another output"
    assert str(caught.value) == f"{output} {told}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"5",
        b"{}",
        b'{"version": 99}',
        b'{"version": 1}',
        b'{"version": 1, "identity": {"inputs": []}, "suspects": {}}',
        json.dumps({"version": 1, "identity": vars(IDENTITY), "suspects": {"x": 1}}).encode(),
        json.dumps({"version": 1, "identity": vars(IDENTITY), "suspects": []}).encode(),
        b"\xff",
    ],
)
def test_anything_else_is_not_taken_for_it(tmp_path: Path, content: bytes):
    output = tmp_path / "out"
    path = tmp_path / "out.batchllm"
    path.write_bytes(content)
    with pytest.raises(JobError) as caught:
        Memory.beside(output)
    told = "is not what a run of this version leaves; name another output"
    assert str(caught.value) == f"{path} {told}"


def test_saving_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "out"
    memory = saved(output, r5=1)

    def fail(fd: int) -> None:
        raise OSError("no power")

    monkeypatch.setattr(os, "fsync", fail)
    memory.suspects = {6: 1}
    with pytest.raises(OSError, match="no power"):
        memory.save()
    assert Memory.beside(output).suspects == {5: 1}


def test_a_model_is_its_weights_and_its_configuration(tmp_path: Path):
    assert model_identity("org/name") == {"name": "org/name", "files": None}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    first = model_identity(str(tmp_path))
    assert first["name"] == str(tmp_path.resolve())
    (tmp_path / "README.md").write_text("about it")
    assert model_identity(f"{tmp_path}/") == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"123456")
    third = model_identity(str(tmp_path))
    assert len({each["files"] for each in (first, second, third)}) == 3
