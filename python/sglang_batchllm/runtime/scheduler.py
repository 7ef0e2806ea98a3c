"""SGLang's scheduler, which is told each step which requests may be prefilled next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import filterfalse
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.utils import broadcast_pyobj
from sglang.utils import TypeBasedDispatcher

from sglang_batchllm import plugin
from sglang_batchllm.args import ATTENTION_BACKEND, BatchLLMServerArgs
from sglang_batchllm.attention import GroupTable, get_group_table
from sglang_batchllm.request_ids import parse_request_id
from sglang_batchllm.runtime.admission import Admission, tokens_to_prefill
from sglang_batchllm.runtime.batch import batch_of
from sglang_batchllm.runtime.cache import PinnedGroupCache
from sglang_batchllm.runtime.held import ReleaseTexts
from sglang_batchllm.runtime.intake import Intake
from sglang_batchllm.runtime.last_layer import sample_rows_in_last_layer

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        AbortReq,
        BatchTokenizedGenerateReqInput,
        GetInternalStateReq,
        GetInternalStateReqOutput,
    )
    from sglang.srt.server_args import ServerArgs


T = TypeVar("T")

IDLE_SECONDS = 0.05
"""Where nothing runs because texts that wait for their next turn hold the KV, one is given up each
time that this much has passed."""


class BatchLLMScheduler(Scheduler):
    """Stands in for SGLang's Scheduler; without ``batchllm`` it makes one of SGLang's own.

    The waiting queue stays SGLang's, and holds every waiting request. For the moment in which
    SGLang builds a prefill batch it shows only the requests that `Admission` has chosen by the
    plan and by memory, in that order; chunking, LoRA, retraction and all else about the batch
    remain SGLang's decisions.
    """

    def __new__(cls, server_args: ServerArgs, *args: Any, **kwargs: Any):
        if cls is BatchLLMScheduler and not getattr(server_args, "batchllm", False):
            return cls.__base__(server_args, *args, **kwargs)  # type: ignore[misc]
        return super().__new__(cls)

    def init_schedule_policy(self) -> None:
        super().init_schedule_policy()
        assert isinstance(self.tree_cache, PinnedGroupCache)
        assert isinstance(self.server_args, BatchLLMServerArgs)
        self._cache = self.tree_cache
        gather_seconds = self.server_args.batchllm_gather_ms / 1000
        self.intake = Intake(self._cache, self._cache.page_size, gather_seconds, self._agree)
        self.admission = Admission(self.intake, self.max_total_num_tokens)
        self._group_table: GroupTable | None = None
        self._asked_to_mix = self.is_mixed_chunk
        if self.server_args.decode_attention_backend == ATTENTION_BACKEND:
            self._group_table = get_group_table(self.req_to_token_pool)
        plugin.extend_runtime()
        sample_rows_in_last_layer(self.tp_worker.model_runner.model, self.server_args)
        self._held_back: list[Req] | None = None
        self._receiving_list = False
        self._arrived = False  # a request by itself, since the last step
        self._seen_forward_ct = 0
        self._last_forward = 0.0

    # Intake

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher([(ReleaseTexts, self.release_texts)])

    def release_texts(self, recv_req: ReleaseTexts) -> None:
        self._cache.held.release(recv_req.batch, recv_req.programs)
        if not self._cache.held.goes_on(recv_req.batch):
            self.intake.expect_no_later_turns(recv_req.batch)
        self.running_batch.batch_is_full = False

    def handle_batch_generate_request(self, recv_req: BatchTokenizedGenerateReqInput) -> None:
        waiting, compiling = len(self.waiting_queue), len(self.grammar_manager.grammar_queue)
        self._receiving_list = True
        try:
            super().handle_batch_generate_request(recv_req)
        finally:
            self._receiving_list = False
        queued = self.waiting_queue[waiting:]
        place = {tokenized.rid: index for index, tokenized in enumerate(recv_req)}
        requests = queued + self.grammar_manager.grammar_queue[compiling:]
        requests.sort(key=lambda req: place[req.rid])
        for req in requests:
            asked = parse_request_id(req.rid)
            if asked is not None and asked.turn == "first":
                self._cache.held.expect(asked.batch)
        self.intake.plan_list(requests, queued)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        chosen = None
        if self._held_back is not None:  # a prefill batch is being built: keep out of its sight
            chosen, self.waiting_queue = self.waiting_queue, self._held_back
        super()._add_request_to_queue(req, is_retracted)
        accepted = bool(self.waiting_queue) and self.waiting_queue[-1] is req
        if chosen is not None:
            self._held_back, self.waiting_queue = self.waiting_queue, chosen
        if accepted and not self._receiving_list:
            self.intake.arrive(req)
            self._arrived = True

    def abort_request(self, recv_req: AbortReq) -> None:
        with self._watching_departures():
            super().abort_request(recv_req)

    def _abort_on_waiting_timeout(self) -> None:
        with self._watching_departures():
            super()._abort_on_waiting_timeout()

    @contextmanager
    def _watching_departures(self) -> Iterator[None]:
        before = len(self.waiting_queue)
        yield
        if len(self.waiting_queue) != before:
            self.intake.drop({id(req) for req in self.waiting_queue})

    # Scheduling

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        self.intake.retire()
        self._make_room(running_batch)
        free = (
            self._cache.evictable_size() + self._cache.token_to_kv_pool_allocator.available_size()
        )
        self.intake.note_kv_use(self.max_total_num_tokens - free)
        chosen: list[Req] = []
        if self.waiting_queue and not running_batch.batch_is_full:
            holding = running_batch.reqs + ([self.chunked_req] if self.chunked_req else [])
            chosen, refused = self.admission.choose(
                holding,
                free,
                (self.chunked_prefill_size or self.max_prefill_tokens) - self._chunk_left(),
                self.get_num_allocatable_reqs(len(running_batch.reqs)),
            )
            expired = 0
            if refused and self._cache.held:
                expired = self._agree(self._cache.held.num_expired())
                self._cache.held.release_oldest(expired)
            if refused and not chosen and not expired and not self.intake.gathering:
                running_batch.batch_is_full = bool(holding)  # until a request has ended
        self.is_mixed_chunk = self._mixes(running_batch, chosen, free)
        self._held_back, self.waiting_queue = self.waiting_queue, list(chosen)
        if chosen:  # most steps choose none, and a long queue should cost them nothing
            self._held_back = list(filterfalse(set(chosen).__contains__, self._held_back))
        try:
            plan = super().get_new_batch_prefill(running_batch)
        finally:
            if self.waiting_queue:
                self._held_back[:0] = self.waiting_queue
            self.waiting_queue, self._held_back = self._held_back, None

        batch = plan.batch_to_run
        reqs: list[Req] = []
        if batch is not None:  # a mixed batch also carries requests that decode
            decoding = {id(req) for req in batch.decoding_reqs or ()}
            reqs = [req for req in batch.reqs if id(req) not in decoding]
        self.admission.settle(chosen, {id(req) for req in reqs})
        for req in reqs:
            planned = batch_of(req)
            if planned is not None and planned.member.claimed:
                planned.batch.published(planned.member, self._cache.publish(req))
        if self._group_table is not None and reqs:
            self._enter_groups(self._group_table, reqs)
        if chosen and batch is None and plan.running_batch.is_empty() and self.chunked_req is None:
            if not self._cache.held:
                self.admission.give_up_pins(chosen[0])
            plan.running_batch.batch_is_full = False
        return plan

    def _make_room(self, running_batch: ScheduleBatch) -> None:
        """Give held texts up where they keep everything else from running, and look at the queue
        again when a later turn may have come."""
        if self.forward_ct != self._seen_forward_ct or not running_batch.is_empty():
            self._seen_forward_ct = self.forward_ct
            self._last_forward = time.monotonic()
        elif (
            self._cache.held
            and self.waiting_queue
            and self._agree(time.monotonic() - self._last_forward > IDLE_SECONDS)
        ):
            self._cache.held.release_oldest()
            self._last_forward = time.monotonic()
        if self._cache.held and self._arrived:
            running_batch.batch_is_full = False
        self._arrived = False

    def _chunk_left(self) -> int:
        """Tokens still to compute of the prompt that is prefilled in chunks."""
        req = self.chunked_req
        return 0 if req is None else len(req.full_untruncated_fill_ids) - len(req.prefix_indices)

    def _mixes(self, running_batch: ScheduleBatch, chosen: list[Req], free: int) -> bool:
        """Whether the running requests decode along in a step that prefills.

        SGLang retracts only in steps without prefill, so memory must suffice for both parts.
        """
        if not self._asked_to_mix or running_batch.is_empty():
            return False
        tokens = self._chunk_left() + sum(map(tokens_to_prefill, chosen))
        slack = self._cache.page_size * (len(chosen) + 1)
        needed = min(tokens, self.chunked_prefill_size or tokens) + slack
        return free >= needed + running_batch.new_tokens_required_next_decode()

    @staticmethod
    def _enter_groups(table: GroupTable, reqs: list[Req]) -> None:
        """Tell attention who shares slots. Every row is written when the request that holds it is
        prefilled, and so before it decodes; rows of finished requests need no clearing."""
        rows, ids, lengths = [], [], []
        for req in reqs:
            planned = batch_of(req)
            group, length = 0, 0
            if planned is not None:
                group, length = planned.batch.attention_group(
                    planned.member, req.cache_protected_len
                )
            if req.req_pool_idx is not None:
                rows.append(req.req_pool_idx)
                ids.append(group)
                lengths.append(length)
        table.assign(rows, ids, lengths)

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        unfinished = [index for index, req in enumerate(batch.reqs) if not req.finished()]
        while self._cache.held and not batch.check_decode_mem(unfinished):
            self._cache.held.release_oldest()
        # SGLang retracts requests until the rest fits, but has to abort the last one.
        if len(unfinished) == 1 and not batch.check_decode_mem(unfinished):
            self.admission.give_up_pins(batch.reqs[unfinished[0]])
        return super().update_running_batch(batch)

    def _agree(self, decision: T) -> T:
        """The decision of the first rank; clocks differ between ranks, batches must not."""
        if self.ps.tp_size == 1:
            return decision
        return broadcast_pyobj(
            [decision], self.tp_group.rank, self.tp_cpu_group, src=self.tp_group.ranks[0]
        )[0]

    # The report

    def get_internal_state(self, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        output = super().get_internal_state(recv_req)
        self.intake.retire()
        output.internal_state["batchllm_report"] = self.intake.to_dict() | {
            "kv_tokens": {
                "total": self.max_total_num_tokens,
                "free": self._cache.token_to_kv_pool_allocator.available_size(),
                "evictable": self._cache.evictable_size(),
                "pinned": self.intake.pinned_tokens,
                "held": self._cache.held.tokens,
            }
        }
        return output
