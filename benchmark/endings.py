"""Outputs of a random model that end by themselves at given lengths.

A random model never says that it is done. So here, in the scheduler's process and on either side
alike, the last token of an output is replaced by the request's stop token where the output has
reached the length that was drawn for it; SGLang finds it there as it would any other and ends the
request. Nobody is told before: what travels with the request is read in this place only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from processes import in_scheduler

_LENGTHS = "ends_after"
_PROMPT = "samples_of"


def ending_after(tokens: int, limit: int, stop_token: int) -> dict[str, Any]:
    """Sampling parameters of a request that ends by itself after `tokens` tokens of output, or is
    cut off at `limit`."""
    return samples_ending_after([tokens], limit, stop_token, 0) | {"temperature": 0}


def samples_ending_after(
    tokens: Sequence[int], limit: int, stop_token: int, prompt: int
) -> dict[str, Any]:
    """The same of one sample for each of `tokens`, of the prompt with this number; which sample
    gets which length is as they come to the model."""
    return {
        "n": len(tokens),
        "temperature": 1,
        "max_new_tokens": limit,
        "stop_token_ids": [stop_token],
        "custom_params": {_LENGTHS: list(tokens), _PROMPT: prompt},
    }


def end_as_drawn(engine_class: Any) -> None:
    """In engines made from `engine_class` from now on, requests end as `ending_after` says."""
    in_scheduler(engine_class, _end_as_drawn)


def _end_as_drawn() -> None:
    from sglang.srt.managers.schedule_batch import Req

    find_ending = Req.update_finish_state
    drawn: dict[tuple[int, tuple[int, ...]], Iterator[int]] = {}  # of the samples of a prompt

    def length_of(req: Any) -> int | None:
        params = req.sampling_params.custom_params or {}
        if _LENGTHS not in params or not req.sampling_params.max_new_tokens:
            return None  # stock SGLang computes a prompt with several samples by itself first
        lengths = params[_LENGTHS]
        if len(lengths) == 1:
            return lengths[0]
        if not hasattr(req, "drawn_length"):
            key = params[_PROMPT], tuple(lengths)
            turn = drawn.setdefault(key, itertools.cycle(lengths))
            req.drawn_length = next(turn)
        return req.drawn_length

    def find_drawn_ending(self: Any, new_accepted_len: int = 1) -> None:
        length = length_of(self)
        if length is not None and not self.finished():
            stop_tokens: set[int] = set(self.sampling_params.stop_token_ids)
            if len(self.output_ids) == length:
                self.output_ids[-1] = min(stop_tokens)
            else:  # nor does it end before
                stop_tokens |= set(self.eos_token_ids or ())
                if self.output_ids[-1] in stop_tokens:
                    self.output_ids[-1] = min(set(range(len(stop_tokens) + 1)) - stop_tokens)
        find_ending(self, new_accepted_len)

    Req.update_finish_state = find_drawn_ending
