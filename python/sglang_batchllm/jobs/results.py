"""The output of a job: records appended one by one, valid at any instant."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.index import id_digest
from sglang_batchllm.jobs.records import BEGINNING, Recorded, read_record


@dataclass
class AppendedFile:
    """A file of lines, which only one process appends to. Raises JobError for what the disk or
    somebody else is to blame for."""

    path: Path
    _fd: int = field(init=False, default=-1)
    _size: int = field(init=False, default=0)

    def open(self) -> None:
        """Create it, or go on with it; what a killed writer left half is cut off."""
        try:
            self._fd = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            raise JobError(f"{self.path} can't be written: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            self._fd = -1
            raise JobError(f"another run writes {self.path}; wait for it, or stop it") from None
        self._size = self._end_of_last_line()
        half = os.pread(self._fd, len(BEGINNING), self._size).rstrip(b"\0")
        if not BEGINNING.startswith(half):
            self.close()
            raise JobError(f"{self.path} ends in something else than a record; name another file")
        os.ftruncate(self._fd, self._size)

    def lines(self) -> Iterator[bytes]:
        """Of what is there, without their ends."""
        with self.path.open("rb") as stream:
            for line in stream:
                yield line.rstrip(b"\n")

    def append(self, line: bytes) -> None:
        """All of a line, or nothing of it. line: with its end."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise JobError(
                f"{self.path} can't be written: {reason}; mend that and run the same command again"
            ) from None
        self._size += len(line)

    def sync(self) -> None:
        """What was appended survives the machine."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _end_of_last_line(self) -> int:
        end = os.fstat(self._fd).st_size
        while end:
            start = max(0, end - (1 << 16))
            at = os.pread(self._fd, end - start, start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
        return 0


@dataclass
class Results:
    """The output, and the file of errors where that is another."""

    output: AppendedFile
    errors: AppendedFile

    @classmethod
    def at(cls, output: Path, errors: Path | None) -> Results:
        file = AppendedFile(output)
        return cls(file, file if errors in (None, output) else AppendedFile(errors))

    def open(self) -> None:
        try:
            self._each(AppendedFile.open)
        except JobError:
            self.close()
            raise

    def recorded(self) -> Iterator[Recorded]:
        """What earlier runs have done. Raises JobError for a file that holds anything else."""
        for file in self._files():
            for number, line in enumerate(file.lines(), 1):
                try:
                    yield read_record(line)
                except ValueError:
                    raise JobError(
                        f"{file.path} has something else than records in line {number}; "
                        "name another file"
                    ) from None

    def append(self, record: bytes, ok: bool) -> None:
        (self.output if ok else self.errors).append(record)

    def sync(self) -> None:
        self._each(AppendedFile.sync)

    def close(self) -> None:
        self._each(AppendedFile.close)

    def _each(self, act: Callable[[AppendedFile], None]) -> None:
        for file in self._files():
            act(file)

    def _files(self) -> list[AppendedFile]:
        return [self.output] if self.errors is self.output else [self.output, self.errors]


@dataclass
class Done:
    """Rows that earlier runs have recorded, by place where a record names that, else by custom_id.

    digests: uint64[n, 2], see `index.id_digest`.
    """

    digests: np.ndarray
    places: set[tuple[str | None, int]]
    ok: int
    output_tokens: int

    @property
    def count(self) -> int:
        return len(self.digests) + len(self.places)

    @classmethod
    def of(cls, results: Results) -> Done:
        """Raises as `Results.recorded`."""
        digests = bytearray()
        done = cls(np.zeros((0, 2), np.uint64), set(), 0, 0)
        for record in results.recorded():
            if record.place is not None:
                done.places.add(record.place)
            else:
                digests += id_digest(record.custom_id or "")
            done.ok += record.ok
            done.output_tokens += record.output_tokens
        done.digests = np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)
        return done
