"""The records of several runs in one file, in the order of the requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.index import id_digest
from sglang_batchllm.jobs.records import read_record

_PLACES = np.dtype(
    [("id", "V16"), ("file", np.int32), ("offset", np.int64), ("size", np.int64), ("ok", np.bool_)]
)


@dataclass(frozen=True)
class Merged:
    """records: in the file. failed: of these, those of requests without an answer."""

    records: int
    failed: int


def merge(inputs: Sequence[Path], outputs: Sequence[Path], merged: Path) -> Merged:
    """inputs: batch files, one custom_id for each of their requests. outputs: records of runs over
    parts of them. Of a request with several records one that succeeded counts, else the first. Rows
    that could not be read, and so have no custom_id, come last.

    Raises JobError where a request has no record, or a record no request; nothing is written then.
    """
    if merged.exists():
        raise JobError(f"{merged} is there already; name another file, or remove it")
    found, nameless = _records(outputs)
    order = _order(inputs, outputs, found)
    partial = merged.with_name(f"{merged.name}.partial")
    files = [path.open("rb") for path in outputs]
    try:
        with partial.open("wb") as out:
            for place in [*found[order], *nameless]:
                file = files[place["file"]]
                file.seek(int(place["offset"]))
                out.write(file.read(int(place["size"])) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        partial.replace(merged)
    except OSError as error:
        raise JobError(f"{merged} can't be written: {error.strerror}; name another") from error
    finally:
        for file in files:
            file.close()
    failed = int((~found["ok"][order]).sum()) + len(nameless)
    return Merged(len(order) + len(nameless), failed)


def _records(outputs: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Where records stand: one for each custom_id, sorted by it, and those without."""
    places: list[tuple[bytes, int, int, int, bool]] = []
    nameless: list[tuple[bytes, int, int, int, bool]] = []
    for number, path in enumerate(outputs):
        offset = 0
        try:
            with path.open("rb") as file:
                for at, line in enumerate(file, 1):
                    try:
                        record = read_record(line)
                    except ValueError:
                        raise JobError(
                            f"{path} has something else than records in line {at}; "
                            "give the outputs of batchllm run"
                        ) from None
                    digest = id_digest(record.custom_id) if record.custom_id else bytes(16)
                    place = digest, number, offset, len(line.rstrip(b"\n")), record.ok
                    (places if record.custom_id else nameless).append(place)
                    offset += len(line)
        except OSError as error:
            raise JobError(f"{path} can't be read: {error.strerror}") from error
    found = np.array(places, _PLACES)
    by_id = np.lexsort((np.arange(len(found)), ~found["ok"], _keys(found)))
    found = found[by_id]
    first = np.ones(len(found), np.bool_)
    first[1:] = _keys(found)[1:] != _keys(found)[:-1]
    return found[first], np.array(nameless, _PLACES)


def _order(inputs: Sequence[Path], outputs: Sequence[Path], found: np.ndarray) -> np.ndarray:
    """The place among `found` of each request, in the order of the requests."""
    digests: list[bytes] = []
    names: list[str] = []
    for path in inputs:
        try:
            with path.open("rb") as file:
                for line in file:
                    custom_id = _custom_id(line)
                    if custom_id is not None:
                        digests.append(id_digest(custom_id))
                        names.append(custom_id)
        except OSError as error:
            raise JobError(f"{path} can't be read: {error.strerror}") from error
    wanted = np.array(digests, "V16").view(_KEY).reshape(-1)
    keys = _keys(found)
    at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    missing = np.flatnonzero(keys[at] != wanted) if len(keys) else np.arange(len(wanted))
    if len(missing):
        raise JobError(
            f"{len(missing):,} of {len(names):,} requests have no record, {names[missing[0]]!r} is "
            "the first; run what is missing, or give its output, too"
        )
    if len(np.unique(at)) < len(found):
        raise JobError(
            f"{', '.join(map(str, outputs))} have records of {len(found) - len(np.unique(at)):,} "
            f"requests that are not in {', '.join(map(str, inputs))}; give the file that was cut"
        )
    return at


_KEY = np.dtype("S16")
"""Compared as bytes; digests that end in zeros are as rare as those that are equal."""


def _keys(found: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(found["id"]).view(_KEY)


def _custom_id(line: bytes) -> str | None:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
    return custom_id if isinstance(custom_id, str) and custom_id else None
