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

    Where a pass has to end at a branch of the prompts (see `PinnedGroups.next_pass`), those that
    lead there are prefilled in chunks, as many as there are; see `chunking`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._cache: Any = self.tree_cache  # with pinned groups
        seam.set_aside(self, seam.needed_now(self) - seam.is_set_aside(self))

    def add_one_req(
        self, req: Req, has_chunked_req: bool, *args: Any, **kwargs: Any
    ) -> AddReqResult:
        part = self._cache.next_pass(req)
        first = self.new_chunked_req
        left = (req.sampling_params.max_new_tokens or 0) - len(req.output_ids)
        guess = min(max(left, 0), CLIP_MAX_NEW_TOKENS)
        seam.set_aside(self, -guess)
        try:
            with self._at_most(part):
                result = super().add_one_req(req, has_chunked_req, *args, **kwargs)
        finally:
            seam.set_aside(self, guess)
        if self.new_chunked_req is not first and (has_chunked_req or first is not None):
            self._cache.in_chunks.append(req)
            self.new_chunked_req = first
        # Behind a branch, or the end of a prompt, the step goes on.
        taken = self.can_run_list and self.can_run_list[-1] is req
        return self.budget_state() if part is not None and taken else result

    def add_chunked_req(self, req: Req) -> Req | None:
        """With all others that are in chunks: the next pass goes on with each."""
        others, self._cache.in_chunks = self._cache.in_chunks, []
        rest = self._add_chunk(req, len(others))
        for number, other in enumerate(others, 1):
            other.init_next_round_input()
            if self._add_chunk(other, len(others) - number) is not None:
                self._cache.in_chunks.append(other)
        return rest

    def _add_chunk(self, req: Req, others: int) -> Req | None:
        """others: such as come after it, each of which takes a page or more."""
        part, left = self._cache.next_pass(req), self.rem_chunk_tokens
        if others:
            left = max(left - others * self.page_size, self.page_size)
        with self._at_most(left if part is None else min(part, left)):
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
