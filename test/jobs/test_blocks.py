"""Files in blocks of whole lines."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_batchllm.jobs import blocks
from sglang_batchllm.jobs.blocks import Block, lines_of, read_blocks

FILES = st.lists(
    st.lists(
        st.sampled_from([b"\n", b"\r\n", b"a", b" ", b"bcd", b"\rx", b"x" * 40, b"\0"]), max_size=40
    ).map(b"".join),
    min_size=1,
    max_size=3,
)


def blocks_of(files: list[bytes], block_bytes: int, max_row: int) -> list[Block]:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        limits = {"BLOCK_BYTES": block_bytes, "MAX_ROW_BYTES": max_row}
        with patch.multiple(blocks, **limits):
            return [*read_blocks(paths)]


@given(FILES, st.integers(1, 64), st.integers(1, 64))
def test_every_byte_is_in_one_block(files: list[bytes], block_bytes: int, max_row: int):
    found = blocks_of(files, block_bytes, max_row)
    for number, data in enumerate(files):
        offset, line = 0, 1
        for block in (block for block in found if block.file == number):
            assert (block.offset, block.line) == (offset, line)
            if block.too_long:
                end = data.find(b"\n", offset) + 1 or len(data)
            else:
                end = offset + len(block.data)
                assert block.data == data[offset:end] != b""
            assert data[end - 1 : end] == b"\n" or end == len(data)
            line += data.count(b"\n", offset, end)
            offset = end
        assert offset == len(data)
    assert [block.file for block in found] == sorted(block.file for block in found)


@given(FILES, st.integers(1, 64), st.integers(1, 64))
def test_every_line_is_found_where_it_is(files: list[bytes], block_bytes: int, max_row: int):
    """As lines, or as too long, with its length."""
    expected = []
    for number, data in enumerate(files):
        offset = 0
        for line, text in enumerate(data.split(b"\n"), 1):
            held = text.rstrip(b"\r")
            if text.strip():
                expected.append((number, line, offset, held))
            offset += len(text) + 1
    found = []
    for block in blocks_of(files, block_bytes, max_row):
        if block.too_long:
            whole = files[block.file][block.offset :].split(b"\n")[0]
            assert block.too_long == len(whole.removesuffix(b"\r")) > max_row
            found.append((block.file, block.line, block.offset, whole.rstrip(b"\r")))
        else:
            found += [(block.file, *line) for line in lines_of(block)]
    assert [each for each in found if each[3].strip()] == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("before", [b"", b"a\n", b"\n"])
def test_a_line_of_the_greatest_length_is_whole(before: bytes, end: bytes):
    for block_bytes in range(1, 14):
        (longest,) = [
            text
            for block in blocks_of([before + b"x" * 10 + end], block_bytes, 10)
            for _, _, text in lines_of(block)
            if text != b"a"
        ]
        assert longest == b"x" * 10


def test_of_a_line_that_is_too_long_little_is_held(tmp_path: Path):
    path = tmp_path / "long"
    path.write_bytes(b"a\n" + b"x" * (40 << 20) + b"\nb\n")
    with patch.multiple(blocks, BLOCK_BYTES=1 << 10, MAX_ROW_BYTES=1 << 12):
        found = [*read_blocks([path])]
    assert sum(len(block.data) for block in found) == 4
    assert [block.too_long for block in found if block.too_long] == [40 << 20]
    assert [line for block in found for line, _, _ in lines_of(block)] == [1, 3]
