"""Input files as blocks of whole lines, whatever their size."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sglang_batchllm.jobs.rows import MAX_ROW_BYTES

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Lines of one file, which begin at `offset` with line number `line` (from 1). data ends with a
    line's end or the file's. too_long: bytes of a line that is too long to be held, in place of
    data, else 0; its end is not among them."""

    file: int
    line: int
    offset: int
    data: bytes
    too_long: int = 0


def read_blocks(paths: Sequence[Path]) -> Iterator[Block]:
    """All of the files' bytes, in order."""
    for file, path in enumerate(paths):
        with path.open("rb") as stream:
            yield from _blocks_of(file, stream)


def _blocks_of(file: int, stream: BinaryIO) -> Iterator[Block]:
    line, offset = 1, 0
    while data := stream.read(BLOCK_BYTES):
        rest = stream.readline(MAX_ROW_BYTES + 2)  # with an end of two bytes
        if len(rest) == MAX_ROW_BYTES + 2 and not rest.endswith(b"\n"):
            whole, end, begun = data.rpartition(b"\n")
            whole += end
            if whole:
                yield Block(file, line, offset, whole)
                line += whole.count(b"\n")
                offset += len(whole)
            size, last = len(begun) + len(rest), rest[-2:]
            while not last.endswith(b"\n") and (piece := stream.readline(BLOCK_BYTES)):
                size += len(piece)
                last = (last + piece)[-2:]
            yield Block(file, line, offset, b"", size - len(last) + len(last.rstrip(b"\r\n")))
            line += 1
            offset += size
            continue
        data += rest
        yield Block(file, line, offset, data)
        line += data.count(b"\n")
        offset += len(data)


def lines_of(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """Line number, offset in the file and text of each line that is not blank."""
    line, offset = block.line, block.offset
    for text in io.BytesIO(block.data):
        if text.strip():
            yield line, offset, text.rstrip(b"\r\n")
        line += 1
        offset += len(text)
