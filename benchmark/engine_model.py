"""A model of SGLang's scheduler over a KV pool of counters, driven by the real runtime objects.

Planning, pins, intake and admission are those of `sglang_batchllm.runtime`. What SGLang does
around them is modelled after its 0.5.17 sources and `runtime.scheduler`: `PrefillAdder` (the
budget of a prefill batch), `Scheduler.get_next_batch_to_run` (prefill first, or decode), mixed
batches and `ScheduleBatch.retract_decode`. One step's result is known after the next has been
launched, so every request decodes once too often, as it does there.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from cost_model import Work
from kv_model import KVPool, Request
from sglang_batchllm.runtime.admission import Admission, tokens_to_prefill
from sglang_batchllm.runtime.batch import PlannedBatch, batch_of
from sglang_batchllm.runtime.intake import Intake
from sglang_batchllm.runtime.pins import ROOT

MAX_PREFILL_TOKENS = 16384
"""SGLang's default."""


@dataclass(frozen=True)
class Policy:
    """chunk: tokens of a prefill or mixed step at most. mixed: decode rows ride in prefill steps.
    max_running: requests that may hold KV at once."""

    chunk: int = 8192
    mixed: bool = False
    max_running: int = 2048


class EngineModel:
    """Runs one list of requests to the end; `works` has what each step did.

    Raises RuntimeError where no step can make progress.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[int],
        capacity: int,
        policy: Policy,
    ):
        self.pool = KVPool(capacity)
        self.policy = policy
        self.requests = [
            Request(str(i), array("q", prompt), SimpleNamespace(max_new_tokens=output))
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        self._intake: Any = Intake(self.pool, 1, 0.0, lambda decision: decision)
        self._intake.plan_list(self.requests, self.requests)
        self.batch: PlannedBatch = self._intake.batches[0]
        self.pool.attach(self.batch, [request.origin_input_ids for request in self.requests])
        self._group_of: list[int] = self.batch.plan.group_of.tolist()
        self._prefix_len: list[int] = self.batch.plan.groups.prefix_len.tolist()
        self._admission: Any = Admission(self._intake, capacity)
        self._waiting = len(self.requests)
        self._running: list[Request] = []
        self._prefilled: list[Request] = []  # in the step before, to run from now on
        self._chunked: Request | None = None
        self._full = False
        self._stuck = False
        self.works: list[Work] = []

    def run(self) -> list[Work]:
        while self.batch.unfinished:
            self._step()
        return self.works

    def _choose(self) -> list[Request]:
        """As BatchLLMScheduler.get_new_batch_prefill asks `Admission`."""
        if not self._waiting or self._full:
            return []
        holding = self._running + ([self._chunked] if self._chunked else [])
        budget = self.policy.chunk - self._chunk_left
        room = self.policy.max_running - len(self._running)
        chosen, refused = self._admission.choose(holding, self.pool.available, budget, room)
        if refused and not chosen:
            self._full = bool(holding)
        return chosen

    def _mixes(self, chosen: list[Request]) -> bool:
        """As BatchLLMScheduler._mixes, whose bound on the memory this is."""
        tokens: int = self._chunk_left + sum(map(tokens_to_prefill, chosen))  # type: ignore
        needed = min(tokens, self.policy.chunk) + len(chosen) + 1 + len(self._running)
        return self.policy.mixed and self.pool.available >= needed

    @property
    def _chunk_left(self) -> int:
        """Tokens still to compute of the prompt that is prefilled in chunks."""
        request = self._chunked
        return 0 if request is None else request.tokens - len(request.prefix_indices)

    def _step(self) -> None:
        """As Scheduler.get_next_batch_to_run, and then what the step leaves behind."""
        self._running += self._prefilled
        self._prefilled = []
        chosen = self._choose()
        riding = self._running if self._mixes(chosen) else []
        ranges = self._prefill_batch(chosen, len(riding))
        if ranges:
            rows = riding
        else:
            if chosen and not self._running and self._chunked is None:
                self._admission.give_up_pins(chosen[0])
                self._full = False
            rows = self._decode_batch()
            if not rows and self._stuck:
                raise RuntimeError("nothing runs and nothing can be admitted")
            self._stuck = not rows
        for row in rows:
            row.own += 1
        self.pool.take(len(rows))
        if ranges or rows:
            self.works.append(self._work(ranges, rows))
        for row in list(rows):
            if row.decoded:
                self._finish(row)
            else:
                row.output_ids.append(0)
        for request in self._prefilled:
            if not request.decoded:
                request.output_ids.append(0)

    def _prefill_batch(self, chosen: list[Request], riding: int) -> dict[Request, range]:
        """Prompt tokens to prefill by request, in slots of their own or the cache's by now.

        riding: rows that decode in the same step.
        """
        budget = _PrefillBudget(self.pool, self.policy.chunk, riding)
        ranges: dict[Request, range] = {}
        if self._chunked is not None:
            request = self._chunked
            start = len(request.prefix_indices)
            length = budget.continue_chunk(self._chunk_left)
            ranges[request] = range(start, start + length)
        for request in chosen:
            request.node = self.pool.match(self._member(request).home)
            self.pool.lock(request.node, 1)
            start = min(self.batch.pins.depth[request.node], request.tokens - 1)
            length = budget.add(request.tokens - start)
            if not length:
                self.pool.lock(request.node, -1)
                self._full = self._full or budget.no_memory
                break
            request.prefix_indices = range(start)
            if request.cached_tokens < 0:
                request.cached_tokens = start
            ranges[request] = range(start, start + length)
            if budget.closed:
                self._full = self._full or budget.no_memory
                break
        self._admission.settle(chosen, {id(request) for request in ranges})
        self._waiting -= sum(request is not self._chunked for request in ranges)
        self._chunked = None
        for request, span in ranges.items():
            self.pool.take(len(span))
            request.own += len(span)
        for request, span in ranges.items():
            self._publish(request, span.stop)
            if span.stop < request.tokens:
                self._chunked = request
                request.prefix_indices = range(span.stop)
            else:
                self._prefilled.append(request)
        return ranges

    def _publish(self, request: Request, end: int) -> None:
        request.already_computed = end
        member = self._member(request)
        ready = [node for node in member.claimed if self.batch.pins.depth[node] <= end]
        if ready:
            self.pool.share(request, ready)
        if member.claimed:
            self.batch.published(member, end)

    def _decode_batch(self) -> list[Request]:
        """The rows of a decode step, after retracting some if memory is short."""
        rows = self._running
        if len(rows) > self.pool.available:
            if len(rows) == 1:
                self._admission.give_up_pins(rows[0])
            rows.sort(key=lambda r: (len(r.output_ids), -len(r.origin_input_ids)), reverse=True)
            while len(rows) > self.pool.available:
                if len(rows) == 1:
                    raise RuntimeError("the pool does not hold one request")
                self._retract(rows.pop())
            self._full = False
        return rows

    def _retract(self, request: Request) -> None:
        self._give_back(request)
        self._intake.arrive(request)
        self._waiting += 1

    def _finish(self, request: Request) -> None:
        self._running.remove(request)
        request.finished_reason = SimpleNamespace(to_json=lambda: {"type": "length"})
        self._full = False
        self._give_back(request)

    def _give_back(self, request: Request) -> None:
        self.pool.lock(request.node, -1)
        self.pool.own -= request.own
        request.own, request.node, request.prefix_indices = 0, ROOT, range(0)
        self.batch.leave(self._member(request), request)  # type: ignore[arg-type]

    def _work(self, ranges: dict[Request, range], rows: list[Request]) -> Work:
        context = sum(row.tokens for row in rows)
        members = Counter(self._group_of[self._member(row).index] for row in rows)
        saved = sum((n - 1) * self._prefix_len[group] for group, n in members.items() if group >= 0)
        return Work(
            prefill_tokens=sum(map(len, ranges.values())),
            attended=sum(len(span) * (span.start + span.stop) // 2 for span in ranges.values()),
            decode_requests=len(rows),
            context=context,
            unique_kv=context - saved,
            kv_used=self.pool.used,
        )

    @staticmethod
    def _member(request: Request) -> Any:
        planned = batch_of(request)  # type: ignore[arg-type]
        assert planned is not None
        return planned.member


class _PrefillBudget:
    """What still fits into a prefill batch: `runtime.adder` over `PrefillAdder`, page size 1.

    closed: no further request may be tried. no_memory: for lack of memory.
    """

    def __init__(self, pool: KVPool, chunk: int, riding: int):
        self._pool = pool
        self._chunk_left = chunk - riding
        self._input_left = MAX_PREFILL_TOKENS - riding
        self._taken = riding
        self.closed = self.no_memory = False

    @property
    def _memory_left(self) -> int:
        return self._pool.available - self._taken

    def continue_chunk(self, length: int) -> int:
        """Tokens of the chunked request that are prefilled; it can not wait."""
        left = min(self._chunk_left, self._memory_left)
        return self._take(length, left if left > 0 else self._chunk_left)

    def add(self, length: int) -> int:
        """Tokens of the request that are prefilled, 0 if it has to wait."""
        if self.closed or length + 1 >= self._memory_left:
            self.no_memory = not self.closed
            return 0
        return self._take(length, self._chunk_left)

    def _take(self, length: int, limit: int) -> int:
        taken = max(min(length, limit), 0)
        self._taken += taken + 1
        self._chunk_left -= taken
        self._input_left -= taken
        self.no_memory = self._memory_left <= 0
        self.closed = self.no_memory or min(self._chunk_left, self._input_left) <= 0
        return taken
