"""How many tokens a request is expected to decode."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_EXPECTED_OUTPUT = 4096
"""Cap on the output that is set aside for a request, in tokens; SGLang's own admission caps its
estimate at the same number by default."""

ENOUGH_FINISHED = 8
"""Requests that ended by themselves from which a length is estimated."""

EXTRA_STEPS = 1
"""With overlap scheduling a request takes one more slot before it is known to have ended."""

_HINT = re.compile(r"#out=(\d+)$")


def hinted_output(rid: str) -> float:
    """The caller's hint: a request id that ends in ``#out=120`` announces about 120 tokens. NaN
    if there is none."""
    found = _HINT.search(rid)
    return float(found[1]) if found else math.nan


def most_output(req: Req) -> int:
    """Tokens that the request may still decode, capped; SGLang fills in max_new_tokens."""
    left = (req.sampling_params.max_new_tokens or 0) - len(req.output_ids)
    return max(min(left, MAX_EXPECTED_OUTPUT), 0)


def finish_type(req: Req) -> str:
    """SGLang's word for how a request finished: "stop" by itself, "length", "abort"."""
    return "abort" if req.finished_reason is None else req.finished_reason.to_json()["type"]


def expected_steps(hint: Any, decoded: Any, most: Any, shown: Any) -> Any:
    """Decode steps for which requests are expected to hold their KV from now on.

    All are numbers or arrays with an entry per request. hint: the caller's, or NaN. decoded:
    tokens so far. most: see `most_output`. shown: see `OutputLengths.remaining`, or infinity.
    """
    announced = hint - decoded
    return np.minimum(np.where(announced > 0, announced, shown), most) + EXTRA_STEPS


@dataclass(slots=True)
class OutputLengths:
    """What a set of requests shows about its output lengths.

    Requests that still run count too, by what they have decoded so far: early on only the short
    ones have finished, and their mean alone would promise too much. So do those that were cut off
    at their max_new_tokens or aborted. The estimate is the maximum likelihood mean of a geometric
    length with censored observations, tokens seen per request that ended by itself. Being
    memoryless it is also what any of them is expected to decode from now on.

    ended: requests that ended by themselves; tokens: decoded by all that are finished.
    """

    ended: int = 0
    tokens: int = 0

    def add(self, req: Req) -> None:
        """A request has finished."""
        self.ended += finish_type(req) == "stop"
        self.tokens += len(req.output_ids)

    def remaining(self, running_tokens: int) -> float | None:
        """Tokens still to come of any request, or None while too little is known.

        running_tokens: decoded so far by requests of the set that run.
        """
        if self.ended < ENOUGH_FINISHED:
            return None
        return (self.tokens + running_tokens) / self.ended
