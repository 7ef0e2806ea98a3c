"""Outputs of a random model that end by themselves at given lengths.

A random model never says that it is done. So here, in the scheduler's process and on either side
alike, the last token of an output is replaced by the request's stop token where the output has
reached the length that was drawn for it; SGLang finds it there as it would any other and ends the
request. Nobody is told before: what travels with the request is read in this place only.
"""

from __future__ import annotations

from typing import Any

from processes import in_scheduler

_LENGTH = "ends_after"


def ending_after(tokens: int, limit: int, stop_token: int) -> dict[str, Any]:
    """Sampling parameters of a request that ends by itself after `tokens` tokens of output, or is
    cut off at `limit`."""
    return {
        "temperature": 0,
        "max_new_tokens": limit,
        "stop_token_ids": [stop_token],
        "custom_params": {_LENGTH: tokens},
    }


def end_as_drawn(engine_class: Any) -> None:
    """In engines made from `engine_class` from now on, requests end as `ending_after` says."""
    in_scheduler(engine_class, _end_as_drawn)


def _end_as_drawn() -> None:
    from sglang.srt.managers.schedule_batch import Req

    find_ending = Req.update_finish_state

    def find_drawn_ending(self: Any, new_accepted_len: int = 1) -> None:
        sampling = self.sampling_params
        length = (sampling.custom_params or {}).get(_LENGTH)
        if length is not None and not self.finished():
            stop_tokens: set[int] = set(sampling.stop_token_ids)
            if len(self.output_ids) == length:
                self.output_ids[-1] = min(stop_tokens)
            else:  # nor does it end before
                stop_tokens |= set(self.eos_token_ids or ())
                if self.output_ids[-1] in stop_tokens:
                    self.output_ids[-1] = min(set(range(len(stop_tokens) + 1)) - stop_tokens)
        find_ending(self, new_accepted_len)

    Req.update_finish_state = find_drawn_ending
