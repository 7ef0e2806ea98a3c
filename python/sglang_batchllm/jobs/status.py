"""How far a job is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from sglang_batchllm.planning.summary import PlanReport

Phase = Literal["reading", "planning", "starting", "running", "restarting", "done"]


@dataclass(frozen=True)
class Counts:
    """Rows. done: answered with status 200. failed: with a record of an error."""

    total: int
    done: int
    failed: int


@dataclass
class Status:
    """Rows: `total`, of which `found` had a record already; `done` and `failed` count those, too.

    output_tokens: of all answers. computed_tokens, tokens_saved: prompt tokens of this run, as the
    server counts them; None where it does not, or died. plan: over all rows, None where prompts
    were read as bytes. deaths: times that the server was lost. note: the last thing worth saying.
    """

    phase: Phase = "reading"
    rows_read: int = 0
    total: int = 0
    found: int = 0
    done: int = 0
    failed: int = 0
    output_tokens: int = 0
    computed_tokens: int | None = None
    tokens_saved: int | None = None
    deaths: int = 0
    note: str | None = None
    plan: PlanReport | None = None
    started: float = field(default_factory=time.monotonic)
    running_since: float | None = None
    output_tokens_before: int = 0

    @property
    def counts(self) -> Counts:
        return Counts(self.total, self.done, self.failed)

    @property
    def ended(self) -> int:
        """Rows that have a record."""
        return self.done + self.failed
