"""A batch file cut into several, for as many engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.index import Index
from sglang_batchllm.jobs.whole import check_new, write_whole
from sglang_batchllm.planning import BatchPlan, Partition, partition

UNSAID_OUTPUT = 128
"""Tokens that a row is taken to decode that does not limit them."""


def shard_rows(index: Index, plan: BatchPlan, shards: int) -> Partition:
    """By predicted time, see `planning.partition`."""
    said = index.places["output"].astype(np.int64)
    return partition(plan, shards, np.where(said > 0, said, UNSAID_OUTPUT))


def write_shards(
    paths: Sequence[Path], index: Index, shard_of: np.ndarray, shards: int, folder: Path
) -> None:
    """A file for each shard, with its lines as they stand in `paths` and in their order. Those that
    can't run are in the first, whose run tells of them.

    Raises JobError, before anything is written, where a file is there already.
    """
    names = [folder / f"{shard + 1:04d}-of-{shards:04d}.jsonl" for shard in range(shards)]
    for name in names:
        check_new(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{folder} can't be made: {error.strerror}; name another") from error
    for shard, name in enumerate(names):
        lines = _lines(paths, index, np.flatnonzero(shard_of == shard))
        write_whole(name, lines if shard else chain(lines, _bad_lines(paths, index)))


def _lines(paths: Sequence[Path], index: Index, rows: np.ndarray) -> Iterator[bytes]:
    places = index.places[rows]
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            for place in places[places["file"] == number]:
                file.seek(int(place["offset"]))
                yield file.read(int(place["size"]))


def _bad_lines(paths: Sequence[Path], index: Index) -> Iterator[bytes]:
    for number, path in enumerate(paths):
        wanted = {bad.line for bad in index.bad if bad.file == number}
        if wanted:
            with path.open("rb") as file:
                for at, line in enumerate(file, 1):
                    if at in wanted:
                        yield line.rstrip(b"\r\n")
