"""What is given up where nothing could run otherwise: held texts first, then pins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang_batchllm.policy.admission.running import Running
from sglang_batchllm.policy.batch import Member, member_of
from sglang_batchllm.policy.intake import Intake
from sglang_batchllm.policy.ledger import Ledger
from sglang_batchllm.policy.requests import Request
from sglang_batchllm.policy.step import View
from sglang_batchllm.policy.texts import HeldTexts

IDLE_SECONDS = 0.05
"""Where nothing runs because texts that wait for their next turn hold the KV, one is given up each
time that this much has passed."""


class Rescue:
    """Sees what would stand still, and lets go of what that takes."""

    def __init__(
        self,
        texts: HeldTexts,
        intake: Intake,
        running: Running,
        ledger: Ledger,
        agree: Callable[[Any], Any],
    ):
        """agree: as `BatchPolicy` has it."""
        self._texts = texts
        self._intake = intake
        self._running = running
        self._ledger = ledger
        self._agree = agree
        self._last_step = 0.0

    def look(self, view: View) -> None:
        """Before each choice: where held texts keep everything else from running, they go one by
        one."""
        now = time.monotonic()
        if view.stepped or view.decoding:
            self._last_step = now
        elif (
            self._texts and self._intake.waits and self._agree(now - self._last_step > IDLE_SECONDS)
        ):
            self._texts.release_oldest()
            self._last_step = now

    def make_way(self, request: Request) -> None:
        """The request, whose prompt is prefilled in chunks, finds no memory for the next one, and
        nothing else runs that would give some back."""
        if self._texts:
            self._texts.release_oldest()
        else:
            self.give_up_pins(member_of(request))

    def make_room(self, fits: Callable[[], bool], decoding: Sequence[Request]) -> None:
        """Let go of what is held until the next decode step fits, before the engine retracts
        requests. decoding: those that are in it."""
        while self._texts and not fits():
            self._texts.release_oldest()
        # SGLang retracts requests until the rest fits, but has to abort the last one.
        if len(decoding) == 1 and not fits():
            self.give_up_pins(member_of(decoding[0]))

    def give_up_pins(self, member: Member | None) -> None:
        """Let go of every pin that the request does not need, since it could not run otherwise."""
        batches = {batch.number: batch for batch in self._intake.batches_waiting()}
        batches |= {batch.number: batch for batch in self._ledger.lists}
        for other in self._running.members:
            if other.batch is not None:
                batches[other.batch.number] = other.batch
        for batch in batches.values():
            mine = member if member is not None and member.batch is batch else None
            self._ledger.relaxed(batch, batch.pins.relax(mine))
