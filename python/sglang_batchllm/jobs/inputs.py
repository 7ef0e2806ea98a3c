"""The rows of an index, from their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sglang_batchllm.jobs.errors import JobError, RowError
from sglang_batchllm.jobs.index import Index, id_digest
from sglang_batchllm.jobs.records import error_record
from sglang_batchllm.jobs.rows import Row, Rules


@dataclass
class Inputs:
    """names: of the files, as records have them; None for their paths."""

    paths: Sequence[Path]
    index: Index
    rules: Rules
    names: Sequence[str] | None = None
    _files: dict[int, BinaryIO] = field(default_factory=dict)

    def read(self, row: int) -> Row:
        """Raises JobError where the file is not what it was."""
        place = self.index.places[row]
        file = int(place["file"])
        if file not in self._files:
            self._files[file] = self.paths[file].open("rb")
        self._files[file].seek(int(place["offset"]))
        try:
            found = self.rules.read(self._files[file].read(int(place["size"])))
        except RowError:
            found = None
        if found is None or id_digest(found.custom_id) != place["id"].tobytes():
            raise JobError(
                f"{self.paths[file]} changes while it is read; leave it alone, and run the same "
                "command again"
            )
        return found

    def place(self, row: int) -> tuple[int, int]:
        """The number of its file, and its line."""
        place = self.index.places[row]
        return int(place["file"]), int(place["line"])

    def name(self, file: int) -> str | None:
        """As records have it: None where there is only one."""
        names = self.names or self.paths
        return str(names[file]) if len(names) > 1 else None

    def error_record(self, file: int, line: int, error: RowError) -> bytes:
        return error_record(line, error, self.name(file))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
