"""Result files keep what other commands have put there, and say where each row is from."""

import json
from importlib.metadata import version

import pytest

from results_file import COMMIT_VARIABLE, ResultFile, origin

KEY = ("case", "side")


def test_a_row_replaces_its_like_and_leaves_the_others(tmp_path):
    path = tmp_path / "rows.json"
    first = ResultFile(path, KEY)
    for side in ("fused", "stock"):
        first.add({"case": "M1", "side": side, "seconds": 1.0})
    second = ResultFile(path, KEY)
    second.add({"case": "M1", "side": "fused", "seconds": 2.0})
    rows = json.loads(path.read_text())  # written before the file is done
    second.add({"case": "M2", "side": "fused", "seconds": 3.0})
    assert [(row["side"], row["seconds"]) for row in rows] == [("fused", 2.0), ("stock", 1.0)]
    assert len(json.loads(path.read_text())) == 3


def test_a_row_says_where_it_is_from(tmp_path, monkeypatch):
    origin.cache_clear()
    monkeypatch.setenv(COMMIT_VARIABLE, "0123abc")
    row = ResultFile(None, KEY).add({"case": "M1", "side": "fused"})
    origin.cache_clear()
    assert row["commit"] == "0123abc"
    assert f"sglang {version('sglang')}" in row["versions"]
    assert row["device"] and row["date"] and row["command"].startswith("python ")


def test_a_file_of_another_form_is_left_alone(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="name another file with --out"):
        ResultFile(path, KEY)
    assert path.read_text() == "{}"
