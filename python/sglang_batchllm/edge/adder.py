"""SGLang's builder of prefill batches, without its own guess at the memory that decoding takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    Where a pass has to end at a branch of the prompts (see `PinnedGroups.next_pass`), it is that of
    the prompt that is prefilled in chunks; there is one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._cache: Any = self.tree_cache  # with pinned groups
        seam.set_aside(self, seam.needed_now(self) - seam.is_set_aside(self))

    def add_one_req(
        self, req: Req, has_chunked_req: bool, *args: Any, **kwargs: Any
    ) -> AddReqResult:
        whole, part = self._cache.next_pass(req) or (0, None)
        in_chunks = has_chunked_req or self.new_chunked_req is not None
        if part is not None and in_chunks and min(part, self.rem_chunk_tokens) < whole:
            return AddReqResult.OTHER
        left = (req.sampling_params.max_new_tokens or 0) - len(req.output_ids)
        guess = min(max(left, 0), CLIP_MAX_NEW_TOKENS)
        seam.set_aside(self, -guess)
        try:
            with self._at_most(part):
                result = super().add_one_req(req, has_chunked_req, *args, **kwargs)
        finally:
            seam.set_aside(self, guess)
        # Behind a branch, or the end of a prompt, the step goes on.
        taken = self.can_run_list and self.can_run_list[-1] is req
        return self.budget_state() if part is not None and taken else result

    def add_chunked_req(self, req: Req) -> Req | None:
        _, part = self._cache.next_pass(req) or (0, None)
        with self._at_most(part):
            return super().add_chunked_req(req)

    @contextmanager
    def _at_most(self, tokens: int | None) -> Iterator[None]:
        """Within it, no more are left of the step; None for as many as there are."""
        before = self.rem_chunk_tokens
        if tokens is None or tokens >= before:
            yield
            return
        self.rem_chunk_tokens = tokens
        try:
            yield
        finally:
            self.rem_chunk_tokens += before - tokens

    def _update_prefill_budget(
        self, prefix_len: int, extend_input_len: int, max_new_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        super()._update_prefill_budget(prefix_len, extend_input_len, 0, *args, **kwargs)
