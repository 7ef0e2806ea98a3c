"""SGLang's builder of prefill batches, without its own guess at the memory that decoding takes."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder


class ForecastPrefillAdder(PrefillAdder):
    """Stands in for PrefillAdder: `Admission` has forecast every request it is shown.

    SGLang sets max_new_tokens aside for each new request and a falling share of it for running
    ones. That admits too few where outputs are short and retracts where they are long. Here it
    only checks that a prefill finds its slots now.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rem_total_token_offset = self.cur_rem_token_offset

    def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
        left = (req.sampling_params.max_new_tokens or 0) - len(req.output_ids)
        set_aside = min(max(left, 0), CLIP_MAX_NEW_TOKENS)
        self.rem_total_token_offset -= set_aside
        try:
            return super().add_one_req(req, *args, **kwargs)
        finally:
            self.rem_total_token_offset += set_aside

    def _update_prefill_budget(
        self, prefix_len: int, extend_input_len: int, max_new_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        super()._update_prefill_budget(prefix_len, extend_input_len, 0, *args, **kwargs)
