"""What is remembered of rows, against a plain dict."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.jobs.index import PLACES, BadRow, Index, IndexWriter, Part, id_digest

NAMES = st.lists(st.sampled_from(["a", "b", "c", "\u00e9", "\ud800", "", "long" * 99]), max_size=30)


def digests(names: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(id_digest, names)), np.uint64).reshape(-1, 2)


def index_of(ids: np.ndarray) -> Index:
    places = np.zeros(len(ids), PLACES)
    places["id"] = ids
    return Index(places, [], Path("unused"), "bytes")


@given(NAMES, NAMES)
def test_find_gives_the_row_of_each_custom_id(names: list[str], wanted: list[str]):
    first = {name: row for row, name in reversed([*enumerate(names)])}
    found = index_of(digests(names)).find(digests(wanted)).tolist()
    assert found == [first.get(name, -1) for name in wanted]


@given(NAMES)
def test_repeated_pairs_each_row_with_the_first_of_its_name(names: list[str]):
    first = {name: row for row, name in reversed([*enumerate(names)])}
    expected = [[first[name], row] for row, name in enumerate(names) if first[name] != row]
    assert sorted(index_of(digests(names)).repeated().tolist()) == sorted(expected)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=4, unique=True))
def test_custom_ids_that_are_equal_in_their_first_half_are_told_apart(pairs: list):
    ids = np.array(pairs, np.uint64).reshape(-1, 2)
    index = index_of(ids)
    assert index.find(ids).tolist() == [*range(len(ids))]
    assert index.find(np.array([[7, 7]], np.uint64)).tolist() == [-1]
    assert not len(index.repeated())


@given(st.lists(st.lists(st.lists(st.integers(-5, 1 << 30), min_size=1), max_size=4), max_size=5))
def test_what_is_written_in_parts_is_one_table(parts: list[list[list[int]]]):
    with TemporaryDirectory() as folder:
        writer = IndexWriter(Path(folder) / "ids")
        for number, prompts in enumerate(parts):
            places = np.zeros(len(prompts), PLACES)
            places["prompt"] = [len(prompt) for prompt in prompts]
            ids = np.array([token for prompt in prompts for token in prompt], np.int32)
            writer.add(
                Part(places, ids, [BadRow(0, number, RowError("code", "message"))], "tokens")
            )
        index = writer.finish()
        table = index.table()
        ends = table.offsets.tolist()
        found = [table.tokens[start:end].tolist() for start, end in pairwise(ends)]
        assert found == [prompt for prompts in parts for prompt in prompts]
        assert [bad.line for bad in index.bad] == [*range(len(parts))]
        assert index.unit == "tokens"


@given(
    st.sets(st.tuples(st.integers(0, 2), st.integers(1, 9))),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10))),
)
def test_at_gives_the_row_in_each_line(rows: set, wanted: list):
    places = np.zeros(len(rows), PLACES)
    for place, (file, line) in zip(places, sorted(rows), strict=True):
        place["file"], place["line"] = file, line
    numbers = {place: row for row, place in enumerate(sorted(rows))}
    found = Index(places, [], Path("unused"), "bytes").at(wanted).tolist()
    assert found == [numbers.get(place, -1) for place in wanted]
