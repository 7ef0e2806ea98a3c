"""The records of several runs in one file, in the order of the requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.index import id_digest
from sglang_batchllm.jobs.records import read_record
from sglang_batchllm.jobs.table import check_output, count_rows, is_table, write_answers
from sglang_batchllm.jobs.whole import check_new, write_whole


@dataclass(frozen=True)
class Merged:
    """records: in the file. failed: of these, those of requests without an answer."""

    records: int
    failed: int


class _Place(NamedTuple):
    """Of a record: the number of its file, and where it stands there."""

    file: int
    offset: int
    size: int
    ok: bool


def merge(inputs: Sequence[Path], outputs: Sequence[Path], merged: Path) -> Merged:
    """inputs: batch files, one custom_id for each of their requests, or a table. outputs: records
    of runs over parts of them. Of a request with several records one that succeeded counts, else
    the first. Rows that could not be read, and so have no custom_id, come last. A table's `merged`
    is that table with the answers.

    In memory some 250 bytes for each request. Raises JobError where a request has no record, or a
    record no request; nothing is written then.
    """
    check_new(merged)
    for path in outputs:
        if is_table(path):
            raise JobError(f"{path} is a table; give the records of the runs over its parts")
    tables = [path for path in inputs if is_table(path)]
    if not tables:
        if is_table(merged):
            raise JobError(f"{merged} would be a table, and {_named(inputs)} is none")
        return _merge(inputs, outputs, merged)
    if len(inputs) > 1:
        raise JobError("a table stands alone; merge one after the other")
    check_output(tables[0], merged)
    records = merged.with_name(merged.name + ".records.jsonl")
    check_new(records)
    try:
        counts = _merge(inputs, outputs, records)
        write_answers(tables[0], records, merged)
    finally:
        records.unlink(missing_ok=True)
    return counts


def _merge(inputs: Sequence[Path], outputs: Sequence[Path], merged: Path) -> Merged:
    found, nameless = _records(outputs)
    order: list[_Place] = []
    missing: list[str] = []
    unused = set(found)
    for custom_id in _ids(inputs):
        digest = id_digest(custom_id)
        unused.discard(digest)
        if digest in found:
            order.append(found[digest])
        else:
            missing.append(custom_id)
    if missing:
        raise JobError(
            f"{len(missing):,} of {len(order) + len(missing):,} requests have no record, "
            f"{missing[0]!r} is the first; run what is missing, or give its output, too"
        )
    if unused:
        raise JobError(
            f"{_named(outputs)} have records of {len(unused):,} requests that are not in "
            f"{_named(inputs)}; give the file that was cut"
        )
    if nameless and is_table(inputs[0]):
        raise JobError(f"{_named(outputs)} have records of no row; give the runs over a table")
    order += nameless
    write_whole(merged, _lines(outputs, order))
    return Merged(len(order), sum(not place.ok for place in order))


def _records(outputs: Sequence[Path]) -> tuple[dict[bytes, _Place], list[_Place]]:
    """Where records stand, by `id_digest`, and those without an id."""
    found: dict[bytes, _Place] = {}
    nameless: list[_Place] = []
    for number, path in enumerate(outputs):
        offset = 0
        for at, line in enumerate(_lines_of(path), 1):
            try:
                record = read_record(line)
            except ValueError:
                raise JobError(
                    f"{path} has something else than records in line {at}; "
                    "give the outputs of batchllm run"
                ) from None
            place = _Place(number, offset, len(line.rstrip(b"\n")), record.ok)
            offset += len(line)
            if record.custom_id is None:
                nameless.append(place)
                continue
            digest = id_digest(record.custom_id)
            if digest not in found or (place.ok and not found[digest].ok):
                found[digest] = place
    return found, nameless


def _ids(inputs: Sequence[Path]) -> Iterator[str]:
    for path in inputs:
        if is_table(path):
            yield from map(str, range(count_rows(path)))
            continue
        for line in _lines_of(path):
            try:
                entry = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
            if isinstance(custom_id, str) and custom_id:
                yield custom_id


def _lines_of(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise JobError(f"{path} can't be read: {error.strerror}") from error


def _lines(outputs: Sequence[Path], order: Iterable[_Place]) -> Iterator[bytes]:
    files = [path.open("rb") for path in outputs]
    try:
        for place in order:
            files[place.file].seek(place.offset)
            yield files[place.file].read(place.size)
    finally:
        for file in files:
            file.close()


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
