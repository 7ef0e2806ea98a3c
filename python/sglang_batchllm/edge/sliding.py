"""What requests have left behind of the pool of sliding-window layers is given back in time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_batchllm.edge import seams

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import scheduler as seam
else:
    seam = seams.load("scheduler")


class Sliding:
    """For a cache with such a pool. SGLang leaves what a prompt in chunks has computed to the tree,
    which planned requests do not enter with their own part, and has those that decode give back
    something every hundred steps or so."""

    def __init__(self, cache: Any):
        self._cache = cache
        self._chunked: Req | None = None
        self._computed = 0
        self._parked = False

    def behind_chunk(self, req: Req | None) -> None:
        """To be called each step. req: that is prefilled in chunks."""
        computed = 0 if req is None else seam.computed(req)
        if req is not None and req is self._chunked:
            # A chunk in flight began where the one before ended, and reads the window from there.
            self._cache.slide(req, self._computed)
            self._parked = computed == self._computed
        else:
            self._parked = False
        self._chunked, self._computed = req, computed

    def parked(self) -> Req | None:
        """That request, if its last chunk is done and the next one has not begun."""
        return self._chunked if self._parked else None

    def behind(self, decoding: Iterable[Req]) -> None:
        """Of requests that decode, all that can be given back."""
        for req in decoding:
            if req.decode_batch_idx >= 1:  # its prefill has ended
                self._cache.slide(req, req.seqlen - 1)

    def write_where_rows_say(self, batch: ScheduleBatch, prefilled: Iterable[Req]) -> None:
        """If slots of these requests became others since they were allotted, those are written.
        prefilled: the first ones of the batch, in its order."""
        if not self._cache.moved:
            return
        self._cache.moved = False
        rows: torch.Tensor = batch.req_to_token_pool.req_to_token
        done = 0
        for req in prefilled:
            start, end = seam.step_of(req)
            slots = batch.out_cache_loc[done : done + end - start]
            slots.copy_(rows[seam.row_of(req), start:end])
            done += end - start
