"""SGLang's builder of prefill batches, without its own guess at the memory that decoding takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from sglang_batchllm.edge import seams

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import adder as seam
else:
    seam = seams.load("adder")


class ForecastPrefillAdder(PrefillAdder):
    """Stands in for PrefillAdder: `Admission` has forecast every request it is shown.

    SGLang sets max_new_tokens aside for each new request and a falling share of it for running
    ones. That admits too few where outputs are short and retracts where they are long. Here it
    only checks that a prefill finds its slots now.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        seam.set_aside(self, seam.needed_now(self) - seam.is_set_aside(self))

    def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
        left = (req.sampling_params.max_new_tokens or 0) - len(req.output_ids)
        guess = min(max(left, 0), CLIP_MAX_NEW_TOKENS)
        seam.set_aside(self, -guess)
        try:
            return super().add_one_req(req, *args, **kwargs)
        finally:
            seam.set_aside(self, guess)

    def _update_prefill_budget(
        self, prefix_len: int, extend_input_len: int, max_new_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        super()._update_prefill_budget(prefix_len, extend_input_len, 0, *args, **kwargs)
