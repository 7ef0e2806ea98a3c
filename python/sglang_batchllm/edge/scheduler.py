"""SGLang's scheduler, which is told each step which requests may be prefilled next."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from itertools import filterfalse
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.utils import print_warning_once
from sglang.utils import TypeBasedDispatcher

from sglang_batchllm.attention import GroupTable, get_group_table
from sglang_batchllm.edge import seams
from sglang_batchllm.edge.adder import ForecastPrefillAdder
from sglang_batchllm.edge.args import BatchLLMServerArgs, resolved
from sglang_batchllm.edge.cache import PinnedGroups
from sglang_batchllm.edge.chunking import ChunkingScheduler
from sglang_batchllm.edge.garbage import Garbage, Leftovers
from sglang_batchllm.edge.last_layer import sample_rows_in_last_layer
from sglang_batchllm.edge.messages import AbortList, NameTurns, ReleaseTexts
from sglang_batchllm.edge.mixed import keeps_to_itself, rides_in, what_mixes
from sglang_batchllm.edge.names import ATTENTION_BACKEND
from sglang_batchllm.edge.packing import PackedList, unpacked
from sglang_batchllm.edge.part_line import PartLine
from sglang_batchllm.edge.queue_index import QueueIndex, without
from sglang_batchllm.edge.ranks import Ranks
from sglang_batchllm.edge.scoring import ScoredStep, ask_of, refusal
from sglang_batchllm.edge.sliding import Sliding
from sglang_batchllm.policy.core import BatchPolicy
from sglang_batchllm.policy.parts import Part
from sglang_batchllm.policy.requests import Turn
from sglang_batchllm.policy.scored import was_scored
from sglang_batchllm.policy.shards import Shard
from sglang_batchllm.policy.step import Arrival, Decision, Limits, View
from sglang_batchllm.server.handover import SLICE

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        BatchTokenizedGenerateReqInput,
        GetInternalStateReq,
        GetInternalStateReqOutput,
        TokenizedGenerateReqInput,
    )
    from sglang.srt.server_args import ServerArgs

    from sglang_batchllm.edge.seams.v0_5_17 import scheduler as seam
else:
    seam = seams.load("scheduler")

SNAPSHOT_SECONDS = 1.0
"""How old the load that others see may be while a long queue waits."""

SCORED_STEP = "batchllm_scored_step"
"""An attribute of a pass's result."""


class BatchLLMScheduler(ChunkingScheduler):
    """Stands in for SGLang's Scheduler; without ``batchllm`` it makes one of SGLang's own.

    The waiting queue stays SGLang's, and holds every waiting request. For the moment in which
    SGLang builds a prefill batch it shows only the requests that the policy has chosen, in that
    order; chunking, LoRA, retraction and all else about the batch remain SGLang's decisions.
    """

    @staticmethod
    def prepare_process() -> None:
        """What else this process needs for ``batchllm``; `plugin.py` says what, and sets it."""

    def __new__(cls, server_args: ServerArgs, *args: Any, **kwargs: Any):
        if cls is BatchLLMScheduler and not getattr(server_args, "batchllm", False):
            stock = seam.QueueingScheduler.__base__
            assert stock is not None
            return stock(server_args, *args, **kwargs)
        return super().__new__(cls)

    def init_schedule_policy(self) -> None:
        super().init_schedule_policy()
        assert isinstance(self.tree_cache, PinnedGroups)
        assert isinstance(self.server_args, BatchLLMServerArgs)
        self._cache: Any = self.tree_cache  # one that is SGLang's, too
        limits = Limits(
            capacity=self.max_total_num_tokens,
            page_size=self._cache.page_size,
            chunk=self.chunked_prefill_size or self.max_prefill_tokens,
            gather_seconds=self.server_args.batchllm_gather_ms / 1000,
            mixes=what_mixes(self.server_args, self.tp_worker.model_runner.attn_backend),
            windows=self._cache.window_pool(),
        )
        self._sliding = None if self._cache.window is None else Sliding(self._cache)
        self._keeps_states = limits.windows is not None and limits.windows.recurrent
        debug = self.server_args.log_level.lower() == "debug"
        group: Any = self.tp_group
        self._ranks = Ranks(group.ranks, group.rank, group.cpu_group, checks=debug)
        self._policy = self._cache.policy = BatchPolicy(self._cache, limits, self._ranks.agree)
        self._group_table: GroupTable | None = None
        if resolved(self.server_args).decode_attention_backend == ATTENTION_BACKEND:
            self._group_table = get_group_table(self.req_to_token_pool)
        self.prepare_process()
        sample_rows_in_last_layer(self.tp_worker.model_runner.model, self.server_args)
        self._no_scoring = refusal(self.tp_worker.model_runner.model, self.server_args)
        self._scored_step: ScoredStep | None = None
        self._index = QueueIndex()
        self._held_back: list[Req] | None = None
        self._receiving_list = False
        self._part: Part | None = None  # that is received
        self._part_line = PartLine()
        self._garbage = Garbage()
        self._leftovers = Leftovers()
        self._shard: Shard | None = None  # the same
        self._turns: dict[str, Turn] = {}  # of requests that are announced and have yet to come
        self._seen_forward_ct = 0
        self._snapshot_time = 0.0

    # Arrivals

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher(
            [
                (NameTurns, self.name_turns),
                (ReleaseTexts, self.release_texts),
                (AbortList, self.abort_list),
                (PackedList, self.packed_list_arrived),
            ]
        )

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        self._leftovers.free_some()
        ordered = self._part_line.order(recv_reqs, self._policy.serves_others)
        super().process_input_requests(ordered)

    def is_fully_idle(self, *args: Any, **options: Any) -> bool:
        return not self._part_line and super().is_fully_idle(*args, **options)

    def name_turns(self, recv_req: NameTurns) -> None:
        for rid, (kind, program) in recv_req.turns.items():
            self._turns[rid] = Turn(kind, recv_req.batch, program, recv_req.yields)  # type: ignore[arg-type]

    def release_texts(self, recv_req: ReleaseTexts) -> None:
        self._policy.release_texts(recv_req.batch, recv_req.programs)

    def packed_list_arrived(self, recv_req: PackedList) -> None:
        if recv_req.gather:
            super().handle_batch_generate_request(unpacked(recv_req))
            return
        self._part, self._shard = recv_req.part, recv_req.shard
        try:
            with self._garbage.made_for_long():
                self.handle_batch_generate_request(unpacked(recv_req))
        finally:
            self._part = self._shard = None

    def handle_generate_request(self, recv_req: TokenizedGenerateReqInput, **options: Any) -> None:
        super().handle_generate_request(recv_req, **options)
        if not self._receiving_list:
            self._turns.pop(str(recv_req.rid), None)  # also where it was refused

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
        arrivals = [self._arrival(req) for req in requests]
        self._policy.list_arrived(arrivals, queued, self._part, self._shard)
        for rid in place:
            self._turns.pop(str(rid), None)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        seam.name_space(req)
        chosen = None
        if self._held_back is not None:  # a prefill batch is being built: keep out of its sight
            chosen, self.waiting_queue = self.waiting_queue, self._held_back
        super()._add_request_to_queue(req, is_retracted)
        accepted = bool(self.waiting_queue) and self.waiting_queue[-1] is req
        if chosen is not None:
            self._held_back, self.waiting_queue = self.waiting_queue, chosen
        if accepted:
            self._index.add(req)
        if accepted and not self._receiving_list:
            self._policy.arrived(self._arrival(req))

    def _arrival(self, req: Req) -> Arrival:
        ask = ask_of(req)
        if ask is not None and self._no_scoring is not None:
            print_warning_once(f"batchllm: logprobs of prompts are not shared ({self._no_scoring})")
            ask = None
        return Arrival(req, self._turns.get(req.rid), _can_share(req), ask)

    # Aborts

    def abort_request(self, recv_req: AbortReq) -> None:
        # SGLang takes the id as a beginning.
        rid = "" if recv_req.abort_all else recv_req.rid or ""
        leaving = self._index.beginning_with(rid) if rid else self.waiting_queue
        with self._only_waiting(leaving):
            super().abort_request(recv_req)

    def abort_list(self, recv_req: AbortList) -> None:
        """As an abort of each request by itself, in one pass over those that wait."""
        rids = dict.fromkeys(recv_req.rids)  # in order, as they lie in memory
        waiting = [req for req in map(self._index.get, rids) if req is not None]
        with self._only_waiting(waiting):
            for req in waiting:
                self.refuse_waiting(req, answer=req.rid in recv_req.awaited)
            self.waiting_queue = []
            for rid in rids.keys() - {req.rid for req in waiting}:
                super().abort_request(AbortReq(rid=rid))

    @contextmanager
    def _only_waiting(self, leaving: list[Req]) -> Iterator[None]:
        """Within it nothing waits but these, and those that are gone after it have departed."""
        before = self.waiting_queue
        self.waiting_queue = list(leaving)
        try:
            yield
        finally:
            left = set(self.waiting_queue)
            gone = [req for req in leaving if req not in left]
            self.waiting_queue = without(before, set(gone))
            self.departed(gone)

    def departed(self, gone: Collection[Req]) -> None:
        for req in gone:
            self._index.discard(req)
        self._policy.departed(gone)
        if len(gone) > SLICE:
            self._leftovers.add(gone)

    # Scheduling

    def get_prefill_adder_class(self) -> type[ForecastPrefillAdder]:
        return ForecastPrefillAdder

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        if running_batch.is_empty():
            running_batch.batch_is_full = False  # nothing decodes whose end would say so
        if self._sliding is not None:
            self._sliding.behind_chunk(self.chunked_req)
        decision = self._policy.choose(self._view(running_batch))
        self._ranks.assert_same(req.rid for req in decision.requests)
        if self._group_table is not None and decision.regrouped:
            self._enter_groups(self._group_table, decision.regrouped)
        running_batch.batch_is_full = decision.full
        self.is_mixed_chunk = decision.mixed and not any(map(keeps_to_itself, decision.requests))
        plan = self._build(running_batch, decision)
        batch = plan.batch_to_run
        reqs: list[Req] = []
        if batch is not None:  # a mixed batch also carries requests that decode
            decoding = {id(req) for req in batch.decoding_reqs or ()}
            reqs = [req for req in batch.reqs if id(req) not in decoding]
        idle = plan.running_batch.is_empty() and self.chunked_req is None
        if reqs:
            self._part_line.step_requests = len(reqs)
        for req in reqs:
            self._index.discard(req)
        self._scored_step = ScoredStep.of(batch) if batch is not None else None
        self._policy.launched([(req, seam.computed(req)) for req in reqs], idle)
        if self._sliding is not None and batch is not None:
            self._sliding.write_where_rows_say(batch, reqs)
        if self._group_table is not None and reqs:
            self._enter_groups(self._group_table, reqs)
        if decision.requests and batch is None and idle:
            plan.running_batch.batch_is_full = False
        if self._sliding is not None and batch is None and plan.running_batch.is_empty():
            parked = self._sliding.parked()
            if parked is not None:
                self._policy.make_way(parked)
        return plan

    def _build(self, running_batch: ScheduleBatch, decision: Decision) -> NextBatchPlan:
        """Have SGLang build a prefill batch from the chosen requests alone."""
        chosen = decision.requests
        self._held_back, self.waiting_queue = self.waiting_queue, chosen
        if chosen:  # most steps choose none, and a long queue should cost them nothing
            self._held_back = list(filterfalse(set(chosen).__contains__, self._held_back))
        try:
            return super().get_new_batch_prefill(running_batch)
        finally:
            if self.waiting_queue:
                self._held_back[:0] = self.waiting_queue
            self.waiting_queue, self._held_back = self._held_back, None

    def _view(self, running_batch: ScheduleBatch) -> View:
        stepped, self._seen_forward_ct = (
            self.forward_ct != self._seen_forward_ct,
            self.forward_ct,
        )
        decoding = len(running_batch.reqs)
        chunk_left, chunk_next = self.left_in_chunks()
        return View(
            decoding=decoding,
            available=self._cache.evictable_size() + self._cache.available(),
            max_requests=self.places(running_batch),
            chunk_left=chunk_left,
            chunk_next=chunk_next,
            stepped=stepped,
            full=running_batch.batch_is_full,
            window_available=self._cache.window_available(),
            rides=rides_in(running_batch),
        )

    def _enter_groups(self, table: GroupTable, reqs: list[Req]) -> None:
        """Tell attention who shares slots. Every row is written when the request that holds it is
        prefilled, and so before it decodes; rows of finished requests need no clearing."""
        rows, paths = [], []
        for req in reqs:
            row = seam.row_of(req)
            if row is not None:
                rows.append(row)
                paths.append(self._policy.shared_path(req, seam.tree_tokens(req)))
        table.assign(rows, paths)

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        unfinished = [index for index, req in enumerate(batch.reqs) if not req.finished()]
        decoding = [batch.reqs[i] for i in unfinished]
        if self._sliding is not None and not batch.check_decode_mem(unfinished):
            self._sliding.behind(decoding)
        self._policy.make_room(lambda: batch.check_decode_mem(unfinished), decoding)
        return super().update_running_batch(batch)

    def settles(self) -> bool:
        return self._keeps_states and self._policy.texts_go_on()

    # Logprobs of prompts

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        result = self._run_scored(batch, *args, **kwargs)
        if self._keeps_states:
            with self.forward_stream_ctx if self.enable_overlap else nullcontext():
                self._cache.keep_states()
        return result

    def _run_scored(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        step, self._scored_step = self._scored_step, None
        if step is None or step.batch is not batch:
            return super().run_batch(batch, *args, **kwargs)
        with step.running():
            result = super().run_batch(batch, *args, **kwargs)
        setattr(result, SCORED_STEP, step)
        return result

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        step: ScoredStep | None = getattr(result, SCORED_STEP, None)
        if step is None:
            super().process_batch_result(batch, result)
            return
        step.deliver(result)
        super().process_batch_result(batch, result)
        for req in step.scored():
            was_scored(req)

    def publish_load_snapshot(self, force: bool = False) -> Any:
        """With every prefill step SGLang walks all that wait."""
        now = time.monotonic()
        if now - self._snapshot_time < SNAPSHOT_SECONDS and len(self.waiting_queue) > SLICE:
            return None
        self._snapshot_time = now
        return super().publish_load_snapshot(force)

    def on_idle(self) -> None:
        if self._leftovers:
            return  # once they are gone it may sleep
        super().on_idle()
        self._policy.rest()
        if self.is_fully_idle():
            self._garbage.sweep_if_due()

    # The report

    def get_internal_state(self, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        output = super().get_internal_state(recv_req)
        report = output.internal_state["batchllm_report"] = self._policy.report() | {
            "kv_tokens": {
                "total": self.max_total_num_tokens,
                "free": self._cache.available(),
                "evictable": self._cache.evictable_size(),
                "pinned": self._policy.pinned_tokens,
                "held": self._policy.texts.tokens,
            },
            "rank_messages": self._ranks.messages,
        }
        windows = self._cache.window_pool()
        if windows is not None:
            report["recurrent_states" if windows.recurrent else "window_kv_tokens"] = {
                "total": windows.capacity,
                "free_or_evictable": self._cache.window_available(),
                "pinned": self._policy.pinned_in_windows,
            }
        return output


def _can_share(req: Req) -> bool:
    """Whether equal token ids mean equal KV for this request, and it is no session's, nor invalid
    or aborted already: SGLang ends those."""
    return (
        req.to_finish is None
        and not req.finished()
        and req.input_embeds is None
        and req.positional_embed_overrides is None
        and req.session is None
        and not seam.is_beam(req)
        and len(req.origin_input_ids) > 0
    )
