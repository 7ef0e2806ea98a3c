"""What a job remembers of each row: where it stands, who it is, how its prompt begins.

In memory 50 bytes for each row; the prompts' ids, 4 bytes each, lie in a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sglang_batchllm.jobs.errors import RowError
from sglang_batchllm.planning.tokens import TokenTable

PLACES = np.dtype(
    [
        ("file", np.uint16),
        ("line", np.uint32),  # from 1
        ("offset", np.int64),
        ("size", np.uint32),  # bytes, without the line's end
        ("id", np.uint64, 2),  # `id_digest` of its custom_id
        ("space", np.uint64),  # rows share prompts with those of the same space only
        ("output", np.int32),  # tokens at most, 0 where the row does not say
        ("prompt", np.uint32),  # ids of its prompt
    ]
)


@dataclass(frozen=True)
class BadRow:
    """A row that can't run."""

    file: int
    line: int
    error: RowError


@dataclass(frozen=True)
class Part:
    """What was read of one block. places: `PLACES`[n]; ids: int32, prompt after prompt. unit: see
    `prompts.Reader`."""

    places: np.ndarray
    ids: np.ndarray
    bad: list[BadRow]
    unit: str


def id_digest(custom_id: str) -> bytes:
    """16 bytes that stand for it."""
    return hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()


@dataclass
class Index:
    """The rows of all inputs that could be read. unit: see `prompts.Reader`."""

    places: np.ndarray
    bad: list[BadRow]
    ids_path: Path
    unit: str

    def __len__(self) -> int:
        return len(self.places)

    def table(self) -> TokenTable:
        """The prompts, on disk."""
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.places["prompt"], out=offsets[1:])
        ids = np.memmap(self.ids_path, np.int32, "r") if len(self) else np.zeros(0, np.int32)
        return TokenTable(ids, offsets)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """The row of each custom_id, int64[n]; -1 where there is none. digests: uint64[n, 2]."""
        order, keys = self._by_id()
        rows = np.full(len(digests), -1, np.int64)
        if not len(self) or not len(digests):
            return rows
        at = np.searchsorted(keys[:, 0], digests[:, 0])
        # Of ids that are equal in their first half, which is next to impossible, look at a few.
        for step in range(4):
            here = np.minimum(at + step, len(keys) - 1)
            hit = (rows < 0) & (keys[here] == digests).all(axis=1)
            rows[hit] = order[here[hit]]
        return rows

    def at(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The row in each line of a file, int64[n]; -1 where there is none."""
        if not len(self) or not places:
            return np.full(len(places), -1, np.int64)
        keys = self.places["file"].astype(np.int64) << 32 | self.places["line"]
        wanted = np.array([file << 32 | line for file, line in places], np.int64)
        here = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[here] == wanted, here, -1)

    def repeated(self) -> np.ndarray:
        """Pairs of rows with one custom_id, int64[n, 2]: the first of them, and a later one."""
        order, keys = self._by_id()
        same = np.flatnonzero((keys[1:] == keys[:-1]).all(axis=1)) + 1
        first = np.arange(len(keys))
        first[same] = 0
        first = np.maximum.accumulate(first)
        return np.stack([order[first[same]], order[same]], axis=1)

    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows sorted by custom_id, equals by place, and the ids in that order."""
        ids = self.places["id"]
        order = np.lexsort((ids[:, 1], ids[:, 0]))
        return order, ids[order]


@dataclass
class IndexWriter:
    """Puts an index together from parts, in order."""

    ids_path: Path
    _file: BinaryIO = field(init=False)
    _parts: list[np.ndarray] = field(default_factory=list)
    _bad: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._unit = "tokens"
        self._file = self.ids_path.open("wb")

    def add(self, part: Part) -> None:
        self._file.write(part.ids.tobytes())
        self._parts.append(part.places)
        self._bad.extend(part.bad)
        self._unit = part.unit

    def finish(self) -> Index:
        self._file.close()
        parts: Sequence[np.ndarray] = self._parts or [np.zeros(0, PLACES)]
        return Index(np.concatenate(parts), self._bad, self.ids_path, self._unit)
