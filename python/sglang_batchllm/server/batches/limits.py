"""How much clients may leave on the server."""

from __future__ import annotations

from dataclasses import dataclass

HOUR = 3600
DAY = 24 * HOUR


@dataclass(frozen=True)
class Limits:
    """Bytes, seconds and numbers.

    file_bytes: of one upload, 5 GiB. free_bytes: what uploads leave free on the disk, for the
    output of batches among others. files: uploads and results together. file_seconds: how long a
    file lives that nobody gave another time. record_seconds: how long a batch that has ended is
    still listed.
    """

    file_bytes: int = 5 << 30
    free_bytes: int = 2 << 30
    files: int = 10_000
    file_seconds: int = 30 * DAY
    uploads_at_once: int = 32
    open_batches: int = 100
    record_seconds: int = 90 * DAY
