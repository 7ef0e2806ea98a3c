"""What the routes and the worker work on: the store of one directory."""

from __future__ import annotations

import time
from collections.abc import Callable

from sglang_batchllm.server.batches.batch_store import Batches
from sglang_batchllm.server.batches.database import Database
from sglang_batchllm.server.batches.directory import Directory
from sglang_batchllm.server.batches.file_store import Files
from sglang_batchllm.server.batches.limits import Limits
from sglang_batchllm.server.batches.sweep import remove_left_overs, sweep


class Store:
    """All of it. Threads may share it. Raises DirectoryError for a directory that cannot be used.

    clock: seconds since 1970.
    """

    def __init__(
        self,
        directory: Directory,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ):
        directory.make()
        self.directory = directory
        self.limits = limits or Limits()
        self.clock = clock
        self._database = Database(directory.database)
        self.files = Files(self._database, directory, self.limits, clock)
        self.batches = Batches(self._database, self.limits, clock)

    def tidy(self) -> None:
        """Of a server that begins."""
        remove_left_overs(self._database, self.directory)

    def sweep(self) -> None:
        """From time to time."""
        sweep(self._database, self.directory, self.limits, self.clock)

    def close(self) -> None:
        self._database.close()
