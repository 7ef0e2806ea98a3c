"""Inputs to an index: every row is parsed, checked and tokenized once, on all cores."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_batchllm.jobs.blocks import BLOCK_BYTES, Block, lines_of, read_blocks
from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.jobs.index import PLACES, BadRow, Index, IndexWriter, Part, id_digest
from sglang_batchllm.jobs.prompts import Reader, load_reader
from sglang_batchllm.jobs.rows import Row, Rules, too_long

ALONE_BYTES = 4 * BLOCK_BYTES
"""For so much another process does not pay."""


@dataclass(frozen=True)
class Reading:
    """How rows are read. tokenizer: see `prompts.load_reader`."""

    rules: Rules
    tokenizer: str | None = None
    trust_remote_code: bool = False

    def reader(self) -> Reader:
        return load_reader(self.tokenizer, self.trust_remote_code)


def read_inputs(
    paths: Sequence[Path],
    reading: Reading,
    ids_path: Path,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[Index, str]:
    """The index of the inputs, and a digest of all their bytes.

    ids_path: where the prompts' ids go. progress: is told how many rows are done.
    Raises OSError.
    """
    digest = hashlib.blake2b(digest_size=16)
    writer = IndexWriter(ids_path)
    rows = 0
    size = sum(path.stat().st_size for path in paths)
    blocks = _digested(read_blocks(paths), digest)
    for part in _parts(blocks, reading, size):
        writer.add(part)
        rows += len(part.places) + len(part.bad)
        progress(rows)
    return writer.finish(), digest.hexdigest()


def _digested(blocks: Iterable[Block], digest: Any) -> Iterator[Block]:
    for block in blocks:
        digest.update(b"%d %d %d\n" % (block.file, len(block.data), block.too_long))
        digest.update(block.data)
        yield block


def _parts(blocks: Iterable[Block], reading: Reading, size: int) -> Iterator[Part]:
    if reading.tokenizer is None and size <= ALONE_BYTES:
        reader = reading.reader()
        for block in blocks:
            yield read_block(block, reading.rules, reader)
        return
    processes = min(os.cpu_count() or 1, -(-size // ALONE_BYTES))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_prepare, initargs=(reading,)) as pool:
        waiting: deque[Future[Part]] = deque()
        for block in blocks:
            waiting.append(pool.submit(_read_block, block))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        for part in waiting:
            yield part.result()


_process: tuple[Rules, Reader]
"""Of a process that reads for another."""


def _prepare(reading: Reading) -> None:
    global _process
    sys.modules["torch"] = None  # type: ignore[assignment]  # 400 MB and seconds, for a tokenizer
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    _process = reading.rules, reading.reader()


def _read_block(block: Block) -> Part:
    return read_block(block, *_process)


def read_block(block: Block, rules: Rules, reader: Reader) -> Part:
    """Every row of a block."""
    if block.too_long:
        error = too_long(block.too_long)
        bad = [_bad(block, block.line, error)]
        return Part(np.zeros(0, PLACES), np.zeros(0, np.int32), bad, reader.unit)
    rows: list[Row] = []
    places: list[tuple[Any, ...]] = []
    bad: list[BadRow] = []
    for line, offset, text in lines_of(block):
        try:
            row = rules.read(text)
        except RowError as error:
            bad.append(_bad(block, line, error))
            continue
        rows.append(row)
        digest = np.frombuffer(id_digest(row.custom_id), np.uint64)
        space, output = _space(row.body), _max_tokens(row.body)
        places.append((block.file, line, offset, len(text), digest, space, output, 0))
    table = np.array(places, PLACES)
    ids = reader.read(rows)
    table["prompt"] = [len(prompt) for prompt in ids]
    return Part(table, np.concatenate([np.zeros(0, np.int32), *ids]), bad, reader.unit)


def _bad(block: Block, line: int, error: RowError) -> BadRow:
    return BadRow(block.file, line, error)


def _space(body: dict[str, Any]) -> int:
    """Rows with other weights or another salt share nothing, whatever their prompts."""
    parts = [body.get(key) for key in ("model", "lora_path", "cache_salt", "extra_key")]
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def _max_tokens(body: dict[str, Any]) -> int:
    for key in ("max_completion_tokens", "max_tokens"):
        value = body.get(key)
        if isinstance(value, int) and 0 < value < 1 << 30:
            return value
    return 0
