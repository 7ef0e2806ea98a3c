"""What a job can't do, and what a row can't be."""

from __future__ import annotations


class JobError(ValueError):
    """Nothing of the job can run, or no more of it: one sentence with what to do."""


class ServerAwayError(JobError):
    """A server that somebody else runs has gone, and did not come back in time."""


class RowError(ValueError):
    """One row can't run. code: of the error record. custom_id: where it could be read."""

    def __init__(self, code: str, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str | None]]:
        return RowError, (self.code, str(self), self.custom_id)


class ServerLostError(ConnectionError):
    """The server went away, fell silent, or does not answer; says which."""


class BusyError(Exception):
    """The server takes no list now; it will later."""
