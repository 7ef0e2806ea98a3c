"""SGLang's scheduler and its requests."""

from __future__ import annotations

from collections.abc import Collection

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler


class QueueingScheduler(Scheduler):
    """A scheduler that tells what leaves its waiting queue."""

    def departed(self, gone: Collection[Req]) -> None:
        """These requests have left the waiting queue, and will not run."""
        raise NotImplementedError

    def refuse_waiting(self, req: Req, answer: bool) -> None:
        """For a request that is taken out of the waiting queue. answer: somebody awaits that."""
        self._release_aborted_request(req)
        self.beam_coordinator.retire_group(req)
        if answer:
            self.send_abort_output(AbortReq(rid=req.rid), req)

    def places(self, running_batch: ScheduleBatch) -> int:
        """Requests that may join those that run."""
        return self.get_num_allocatable_reqs(len(running_batch.reqs), running_batch=running_batch)


def computed(req: Req) -> int:
    """Prompt tokens that had slots before the request's present step."""
    return req.prefix_len


def step_of(req: Req) -> tuple[int, int]:
    """The prompt tokens that the request's present step computes, from and to."""
    assert req.extend_end is not None
    return req.prefix_len, req.extend_end


def row_of(req: Req) -> int | None:
    """The request's row in the request pool."""
    return req.kv.req_pool_idx


def tree_tokens(req: Req) -> int:
    """Tokens of it whose slots are the prefix cache's."""
    return req.kv.cache_protected_len


def name_space(req: Req) -> None:
    """Have ``extra_key`` tell whose KV the request may share, its salt included."""
    if req.cache_salt is not None:
        req.extra_key, req.cache_salt = f"{req.extra_key or ''}\0{req.cache_salt}", None


def is_beam(req: Req) -> bool:
    """Whether the request is one of several beams."""
    return req.beam_group is not None
