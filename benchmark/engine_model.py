"""A model of SGLang's scheduler over a KV pool of counters, driven by the real policy.

What runs next, what is pinned and what waits is decided by `sglang_batchllm.policy`, as in the real
scheduler. Modelled here is what SGLang does around it, after its 0.5.17 sources: the budget of a
prefill batch (`PrefillAdder`), prefill first or decode (`get_next_batch_to_run`), mixed batches and
retraction. One step's result is known after the next has been launched, so every request decodes
once too often, as it does there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cost_model import Work
from kv_model import KVPool, Request, make_request
from sglang_batchllm.policy.batch import Member, member_of
from sglang_batchllm.policy.core import BatchPolicy
from sglang_batchllm.policy.parts import Part
from sglang_batchllm.policy.requests import Turn
from sglang_batchllm.policy.rows import Ask
from sglang_batchllm.policy.scored import prefix_limit
from sglang_batchllm.policy.step import Arrival, Limits, Mixes, View

MAX_PREFILL_TOKENS = 16384
"""SGLang's default."""


@dataclass(frozen=True)
class Policy:
    """chunk: tokens of a prefill or mixed step at most. max_running: requests that may hold KV at
    once."""

    chunk: int = 8192
    mixes: Mixes = "none"
    max_running: int = 2048


class EngineModel:
    """Runs requests step by step; `works` has what each step did.

    running: requests that decode. Raises RuntimeError where no step can make progress.
    """

    def __init__(
        self,
        capacity: int,
        policy: Policy = Policy(),
        gather_seconds: float = 0.0,
        pool: type[KVPool] = KVPool,
    ):
        self.pool = pool(capacity)
        self.policy = BatchPolicy(
            self.pool, Limits(capacity, 1, policy.chunk, gather_seconds, policy.mixes)
        )
        self._limits = policy
        self.running: list[Request] = []
        self.waiting: dict[int, Request] = {}  # by identity
        self.chunked: Request | None = None
        self._prefilled: list[Request] = []  # in the step before, to run from now on
        self._full = False
        self._stuck = False
        self._stepped = False
        self.works: list[Work] = []

    # Requests

    def submit_list(
        self,
        requests: Sequence[Request],
        turn: Turn | None = None,
        asks: Sequence[Ask | None] | None = None,
        part: Part | None = None,
    ) -> None:
        """Requests of one call, or part of them. turn: their part in a program. asks: logprobs of
        each one's prompt that it wants."""
        for request in requests:
            self._queue(request)
        asks = asks or [None] * len(requests)
        arrivals = [Arrival(r, turn, True, ask) for r, ask in zip(requests, asks, strict=True)]
        self.policy.list_arrived(arrivals, requests, part)

    def submit(self, request: Request, shareable: bool = True) -> None:
        """A request by itself."""
        self._queue(request)
        self.policy.arrived(Arrival(request, None, shareable))

    def abort(self, request: Request) -> None:
        """End a request, whatever it does."""
        request.end = "abort"
        if self.waiting.pop(id(request), None) is not None:
            self.policy.departed([request])
            return
        for group in (self.running, self._prefilled):
            if request in group:
                group.remove(request)
        if self.chunked is request:
            self.chunked = None
        self._full = False
        self._give_back(request)

    def retract(self, request: Request) -> None:
        """Take a running request's KV, and have it wait again."""
        self.running.remove(request)
        self._full = False
        self._give_back(request)
        self.submit(request)

    def _queue(self, request: Request) -> None:
        self.pool.admit(request)
        self.waiting[id(request)] = request

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self._prefilled or self.chunked)

    def run(self) -> list[Work]:
        """Until nothing is left to do."""
        while self.busy:
            self.step()
        return self.works

    # A step

    def step(self) -> None:
        self.running += self._prefilled
        self._prefilled = []
        decision = self.policy.choose(self._view())
        self._full = decision.full
        riding = self.running if decision.mixed else []
        ranges = self._prefill_batch(decision.requests, len(riding))
        rows = riding if ranges else self._decode_batch()
        if not ranges and not rows and self._stuck:
            raise RuntimeError("nothing runs and nothing can be admitted")
        self._stuck = not ranges and not rows
        self._stepped = not self._stuck
        for row in rows:
            row.own += 1
        self.pool.take(len(rows))
        if ranges or rows:
            self.works.append(_work(ranges, rows, self.pool.used))
        for row in list(rows):
            if row.how_it_ends():
                self._finish(row)
            else:
                row.output_ids.append(0)
        for request in self._prefilled:
            if not request.how_it_ends():
                request.output_ids.append(0)

    def _view(self) -> View:
        return View(
            decoding=len(self.running),
            available=self.pool.available,
            max_requests=self._limits.max_running - len(self.running),
            chunk_left=self._chunk_left,
            chunk_next=self._chunk_left,
            stepped=self._stepped,
            full=self._full,
        )

    @property
    def _chunk_left(self) -> int:
        """Tokens still to compute of the prompt that is prefilled in chunks."""
        return 0 if self.chunked is None else self.chunked.tokens - self.chunked.computed

    def _prefill_batch(self, chosen: list[Request], riding: int) -> dict[Request, range]:
        """Prompt tokens to prefill by request, in slots of their own or the cache's by now.

        riding: rows that decode in the same step.
        """
        budget = _PrefillBudget(self.pool, self._limits.chunk, riding)
        ranges: dict[Request, range] = {}
        matched: dict[Request, int] = {}
        if self.chunked is not None:
            request = self.chunked
            start = matched[request] = request.computed
            ranges[request] = range(start, start + budget.continue_chunk(self._chunk_left))
        for request in chosen:
            if budget.closed:
                break
            member = _member(request)
            request.place, found = self.pool.match(member)
            self.pool.hold(request.place)
            start = min(found, request.tokens - 1)
            limit = prefix_limit(request)
            start = start if limit is None else min(start, limit)
            length = budget.add(request.tokens - start)
            if not length:
                self.pool.release(request.place)
                break
            matched[request] = start
            if request.cached_tokens < 0:
                request.cached_tokens = start
            ranges[request] = range(start, start + length)
        self._full = self._full or budget.no_memory
        self.chunked = None
        for request, span in ranges.items():
            self.waiting.pop(id(request), None)
            self.pool.take(len(span))
            request.own += len(span)
            request.computed = request.already_computed = span.stop
            if span.stop < request.tokens:
                self.chunked = request
            else:
                self._prefilled.append(request)
        idle = not self.running and not ranges
        self.policy.launched([(request, matched[request]) for request in ranges], idle)
        if chosen and idle:
            self._full = False
        return ranges

    def _decode_batch(self) -> list[Request]:
        """The rows of a decode step, after retracting some if memory is short."""
        rows = self.running
        self.policy.make_room(lambda: len(rows) <= self.pool.available, rows)
        if len(rows) > self.pool.available:
            rows.sort(key=lambda r: (len(r.output_ids), -len(r.origin_input_ids)), reverse=True)
            while len(rows) > self.pool.available:
                if len(rows) == 1:
                    raise RuntimeError("the pool does not hold one request")
                self.retract(rows[-1])
        return rows

    def _finish(self, request: Request) -> None:
        request.end = request.how_it_ends()
        self.running.remove(request)
        self._full = False
        self._give_back(request)

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.place)
        self.pool.own -= request.own
        request.own, request.place, request.computed = 0, None, 0
        self.policy.ended(request, request.end)


def list_model(
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[int],
    capacity: int,
    policy: Policy,
    limit: int | None = None,
) -> tuple[EngineModel, list[Request]]:
    """An engine with one list of requests that decode as many tokens as they may, or where all may
    decode up to `limit`, end by themselves after `outputs`."""
    engine = EngineModel(capacity, policy)
    requests = []
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        requests.append(make_request(str(index), prompt, limit or output))
        requests[-1].ends_at = output
    engine.submit_list(requests)
    return engine, requests


def _member(request: Request) -> Member:
    member = member_of(request)
    assert member is not None
    return member


def _work(ranges: dict[Request, range], rows: list[Request], kv_used: int) -> Work:
    context = sum(row.tokens for row in rows)
    members = Counter()
    prefix_lens = {}
    for row in rows:
        member = _member(row)
        if member.batch is not None:
            plan, number = member.batch.plan, member.batch.number
            group = int(plan.group_of[member.index])
            if group >= 0:
                members[number, group] += 1
                prefix_lens[number, group] = int(plan.groups.prefix_len[group])
    saved = sum((count - 1) * prefix_lens[group] for group, count in members.items())
    return Work(
        prefill_tokens=sum(map(len, ranges.values())),
        attended=sum(len(span) * (span.start + span.stop) // 2 for span in ranges.values()),
        decode_requests=len(rows),
        context=context,
        unique_kv=context - saved,
        kv_used=kv_used,
    )


class _PrefillBudget:
    """What still fits into a prefill batch: `edge.adder` over `PrefillAdder`, page size 1.

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
        if length + 1 >= self._memory_left:
            self.closed = self.no_memory = True
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
