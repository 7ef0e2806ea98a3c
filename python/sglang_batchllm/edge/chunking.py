"""Several prompts in chunks at once, where SGLang has one (`Scheduler.chunked_req`).

Where passes end at branches of the prompts, each branch has one that leads there, and the next
branches below it have others. So the leaders of all branches that can be reached go at once, and a
tree of prompts takes about as many passes as it is deep. Those beside SGLang's own are in
`PinnedGroups.in_chunks`: each is in every prefill pass until its prompt ends, and in no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.settling import SettlingScheduler

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import AbortReq

    from sglang_batchllm.edge.seams.v0_5_17 import scheduler as seam
else:
    seam = seams.load("scheduler")


class ChunkingScheduler(SettlingScheduler):
    def init_schedule_policy(self) -> None:
        super().init_schedule_policy()
        self._aborted_in_chunks: list[Req] = []

    def left_in_chunks(self) -> tuple[int, int]:
        """Prompt tokens still to compute of those in chunks, and what the next pass may of them."""
        cache: Any = self.tree_cache
        left = at_once = 0
        for req in self._in_chunks():
            rest = len(req.full_untruncated_fill_ids) - seam.computed(req)
            left += rest
            at_once += cache.next_pass(req) or rest
        return left, at_once

    def _in_chunks(self) -> list[Req]:
        own = [] if self.chunked_req is None else [self.chunked_req]
        return own + self._others

    @property
    def _others(self) -> list[Req]:
        cache: Any = self.tree_cache
        return cache.in_chunks

    def abort_request(self, recv_req: AbortReq) -> None:
        if self._others:
            self._aborted_in_chunks += [
                req
                for req in self._in_chunks()
                if recv_req.abort_all or req.rid.startswith(recv_req.rid or "")
            ]
        super().abort_request(recv_req)

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> Any:
        for req in self._aborted_in_chunks:
            if req in self._in_chunks():
                self._abort_in_chunks(req)
            else:  # its last chunk runs: it ends with that
                req.to_finish = FINISH_ABORT()
        self._aborted_in_chunks.clear()
        others = self._others
        others[:] = [req for req in others if seam.row_of(req) is not None]  # not retracted
        for req in others:
            if seam.step_of(req)[1] > seam.computed(req):
                self.stash_chunked_request(req)
        if last_batch is not None and others and last_batch.forward_mode.is_extend():
            going_on = set(others)
            decode = [index for index, req in enumerate(last_batch.reqs) if req not in going_on]
            last_batch.filter_batch(keep_indices=decode)
            running_batch.batch_is_full = False
        return super().get_next_batch_to_run(running_batch, last_batch)

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> Any:
        self._have_one()
        self.rows_going_on = len(self._in_chunks())  # 0.5.17 asks; later releases count them
        plan = super().get_new_batch_prefill(running_batch)
        self.rows_going_on = 0
        computed = set() if plan.batch_to_run is None else {*plan.batch_to_run.reqs}
        for req in self._others:
            req.inflight_middle_chunks += req in computed
        self._have_one()
        return plan

    def _have_one(self) -> None:
        """SGLang takes itself for idle where it has no prompt in chunks."""
        if self.chunked_req is None and self._others:
            self.chunked_req = self._others.pop(0)

    def _abort_in_chunks(self, req: Req) -> None:
        """As SGLang does with its own."""
        own, aborted = self.chunked_req, self._pending_chunked_abort_req
        self.chunked_req = self._pending_chunked_abort_req = req
        self.process_pending_chunked_abort()
        # It has been told, and its last chunk may still run.
        req.finished_output = True  # type: ignore[assignment]
        self.chunked_req, self._pending_chunked_abort_req = own, aborted
        if own is req:
            self.chunked_req = None
        else:
            self._others.remove(req)


def stream_output(
    stock: Callable[..., None],
    streamer: Any,
    reqs: list[Req],
    return_logprob: bool,
    skip_req: Req | None = None,
) -> None:
    """Nothing is sent of a request whose prompt goes on: SGLang leaves out one."""
    if skip_req is not None:
        reqs = [
            req for req in reqs if req.finished() or len(req.output_ids) > req.send_token_offset
        ]
    stock(streamer, reqs, return_logprob, skip_req)
