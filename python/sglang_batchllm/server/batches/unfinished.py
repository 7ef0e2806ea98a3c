"""Records for requests that a batch had no time for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sglang_batchllm.jobs.blocks import lines_of, read_blocks
from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.jobs.index import id_digest
from sglang_batchllm.jobs.records import error_record
from sglang_batchllm.jobs.results import Results
from sglang_batchllm.jobs.rows import Rules, too_long

EXPIRED = "batch_expired"
_MESSAGE = "This request was not done when the completion window of its batch ended."


def record_expired(inputs: Path, output: Path, errors: Path) -> tuple[int, int]:
    """Give every request that has no record an error. How many have an answer then, and how many
    an error. Takes 100 bytes of memory for each that had a record. Raises JobError as
    `jobs.results` does."""
    results = Results.at(output, errors)
    results.open()
    try:
        done, failed = 0, 0
        ids: set[bytes] = set()  # of requests that were sent
        lines: set[int] = set()  # with requests that were not
        for record in results.recorded():
            done, failed = done + record.ok, failed + (not record.ok)
            if record.place is not None:
                lines.add(record.place[1])
            elif record.custom_id is not None:
                ids.add(id_digest(record.custom_id))
        for line, row in _rows(inputs):
            custom_id = row if isinstance(row, str) else row.custom_id
            if line in lines or (custom_id is not None and id_digest(custom_id) in ids):
                continue
            error = RowError(EXPIRED, _MESSAGE, row) if isinstance(row, str) else row
            results.append(error_record(line, error), ok=False)
            failed += 1
        results.sync()
        return done, failed
    finally:
        results.close()


def _rows(path: Path) -> Iterator[tuple[int, str | RowError]]:
    """Line number and custom_id of each request, or what is wrong with it."""
    rules = Rules()
    for block in read_blocks([path]):
        if block.too_long:
            yield block.line, too_long(block.too_long)
        for line, _, text in lines_of(block):
            try:
                yield line, rules.read(text).custom_id
            except RowError as error:
                yield line, error
