"""SGLang's scheduler and its requests."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler


class QueueingScheduler(Scheduler):
    """A scheduler that tells what leaves its waiting queue.

    rows_going_on: of those whose prompts go on in the batch that is being built.
    """

    rows_going_on = 0

    def departed(self, gone: Collection[Req]) -> None:
        """These requests have left the waiting queue, and will not run."""
        raise NotImplementedError

    def refuse_waiting(self, req: Req, answer: bool) -> None:
        """For a request that is taken out of the waiting queue. answer: somebody awaits that."""
        if answer:
            gone = AbortReq(rid=req.rid)
            self.ipc_channels.send_to_tokenizer.send_output(gone, req)  # type: ignore[arg-type]

    def _abort_on_waiting_timeout(self) -> None:
        before = self.waiting_queue
        super()._abort_on_waiting_timeout()
        if self.waiting_queue is not before:
            self.departed(set(before).difference(self.waiting_queue))

    def places(self, running_batch: ScheduleBatch) -> int:
        """Requests that may join those that run."""
        return self.get_num_allocatable_reqs(len(running_batch.reqs))

    def get_num_allocatable_reqs(self, running_bs: int) -> int:
        """While a batch is built SGLang compares this with all of it, but those that go on in
        chunks have their rows."""
        free = super().get_num_allocatable_reqs(running_bs)
        return min(free + self.rows_going_on, self.max_running_requests - running_bs)

    def get_next_batch_to_run(
        self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None
    ) -> NextBatchPlan:
        """Requests that end with their prefill step enter no decode step, although its result is
        known only after the next step has been launched."""
        in_flight = self.result_queue[0][0].reqs if self.enable_overlap and last_batch else ()
        if last_batch is not None and in_flight and last_batch.forward_mode.is_extend():
            in_chunks = (self.chunked_req, last_batch.chunked_req)
            going_on = [
                index
                for index, req in enumerate(last_batch.reqs)
                if req in in_chunks or not _ends(req)
            ]
            if len(going_on) < len(last_batch.reqs):
                last_batch.filter_batch(keep_indices=going_on)
        return super().get_next_batch_to_run(running_batch, last_batch)

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        """What decodes in a mixed batch has its position from its length, as in later releases:
        here SGLang counts output tokens, as if each had run in the step before."""
        plan = super().get_new_batch_prefill(running_batch)
        batch = plan.batch_to_run
        if batch is not None and batch.decoding_reqs:
            first = len(batch.reqs) - len(batch.decoding_reqs)
            batch.prefix_lens[first:] = (batch.seq_lens_cpu[first:] - 1).tolist()
        return plan

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """SGLang copies the list of free pages for every request that ends in a prefill step;
        within a group of frees, once.

        A group keeps views of the request pool's rows, and the row of a request that goes on is
        written anew before the group ends: so a group only where all are known to end.
        """
        if not batch.forward_mode.is_extend() or not all(map(_ends, batch.reqs)):
            super().process_batch_result(batch, result)
            return
        allocator: Any = self.token_to_kv_pool_allocator
        allocator.free_group_begin()
        try:
            super().process_batch_result(batch, result)
        finally:
            allocator.free_group_end()


def _ends(req: Req) -> bool:
    """Whether the next token is the request's last, unless its prompt goes on."""
    return len(req.output_ids) + 1 >= (req.sampling_params.max_new_tokens or 0)


def computed(req: Req) -> int:
    """Prompt tokens that had slots before the request's present step."""
    return len(req.prefix_indices)


def step_of(req: Req) -> tuple[int, int]:
    """The prompt tokens that the request's present step computes, from and to."""
    assert req.extend_range is not None
    return req.extend_range.start, req.extend_range.end


def row_of(req: Req) -> int | None:
    """The request's row in the request pool."""
    return req.req_pool_idx


def tree_tokens(req: Req) -> int:
    """Tokens of it whose slots are the prefix cache's."""
    return req.cache_protected_len


def name_space(req: Req) -> None:
    """Have ``extra_key`` tell whose KV the request may share; it does."""


def is_beam(req: Req) -> bool:
    """Whether the request is one of several beams; there are none."""
    return False
