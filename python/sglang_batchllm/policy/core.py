"""The one object that a scheduler asks, each step, what runs next.

A step: `choose` says which waiting requests the next prefill may take; the engine builds a batch of
them as far as it can, and `launched` says which are in it. `ended` follows when a request gives its
KV back. The real scheduler, the simulator and the tests drive it the same way.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sglang_batchllm.policy.admission import short
from sglang_batchllm.policy.admission.forecast import MemoryForecast
from sglang_batchllm.policy.admission.lanes import Lanes
from sglang_batchllm.policy.admission.lookahead import Lookahead
from sglang_batchllm.policy.admission.outputs import OutputLengths, hinted_output
from sglang_batchllm.policy.admission.running import Running
from sglang_batchllm.policy.admission.state_slots import StateSlots
from sglang_batchllm.policy.admission.window_forecast import WindowForecast
from sglang_batchllm.policy.batch import (
    Batch,
    Member,
    forget,
    member_of,
    note,
    tokens_to_prefill,
)
from sglang_batchllm.policy.intake import Intake
from sglang_batchllm.policy.ledger import Ledger
from sglang_batchllm.policy.parts import Part, Parts
from sglang_batchllm.policy.paths import SharedPath
from sglang_batchllm.policy.pins import ROOT
from sglang_batchllm.policy.requests import End, Request
from sglang_batchllm.policy.rescue import Rescue
from sglang_batchllm.policy.rows import RowMemory
from sglang_batchllm.policy.shards import Shard
from sglang_batchllm.policy.step import Arrival, Decision, Limits, View
from sglang_batchllm.policy.store import Store
from sglang_batchllm.policy.texts import HeldTexts


class BatchPolicy:
    """Plans what arrives, chooses what runs, and holds the prefixes and texts that will be used.

    texts: of programs, held between their turns.
    """

    def __init__(
        self, store: Store, limits: Limits, agree: Callable[[Any], Any] = lambda value: value
    ):
        """agree: makes a value that depends on this process's clock the same in all ranks."""
        self._store = store
        self._limits = limits
        self._agree = agree
        self._lengths = OutputLengths()
        (self._gathered_row,) = self._lengths.take(-1).tolist()
        self._running = Running()
        self._intake = Intake(self._plan, limits.gather_seconds, self._agree)
        self._lanes = Lanes(self._intake, limits.capacity)
        self._parts = Parts(limits, self._plan, self._start_again, self._lengths)
        self.texts = HeldTexts(store)
        self._row_memory = RowMemory()
        self._ledger = Ledger(limits.page_size)
        self._rescue = Rescue(self.texts, self._intake, self._running, self._ledger, agree)
        self._chosen: list[Member] = []
        self._look_again = False  # although nothing has ended
        self._pressed = False  # memory keeps somebody out
        self._rows_follow = False  # the request in chunks has logprobs to leave to others
        self._prefilled = False  # the last step did so
        self._to_prefill = 0  # tokens that the last step that prefills was to take
        self._claims = 0  # shared prefixes that those of the last prefill step have yet to compute

    # Arrivals

    def list_arrived(
        self,
        arrivals: Sequence[Arrival],
        queued: Iterable[Request],
        part: Part | None = None,
        shard: Shard | None = None,
    ) -> None:
        """The requests of one call, to be planned together.

        queued: those of them that can run; the grammar of the others is being compiled, and they
        arrive later. A list of one is no batch, and counts as a lone request.
        part: these are not all, or not the first; nobody asks for logprobs of prompts then.
        shard: other schedulers have others; one request is a list then, too.
        """
        members = [self._note(arrival) for arrival in arrivals]
        together = [
            member for member, arrival in zip(members, arrivals, strict=True) if arrival.shareable
        ]
        for member in members:
            if member.turn is not None and member.turn.kind == "first":
                self.texts.expect(member.turn.batch)
        parted = None if part is None else self._parts.add(part, together)
        if parted is None and len(together) > (shard is None):
            self._plan(together, True, shard=shard)
        shareable = {id(member) for member in together}
        for request in queued:
            member = member_of(request)
            assert member is not None
            if parted is not None and id(member) in shareable:
                parted.may_run(member)
            else:
                self._intake.arrive(member, id(member) in shareable)
        self._look_again |= self._intake.waits_in("yielding")

    def arrived(self, arrival: Arrival) -> None:
        """A request is to be scheduled: new, or back after a retraction."""
        member = member_of(arrival.request)
        if member is not None and member.batch is not None and not arrival.shareable:
            self.ended(arrival.request, "abort")  # the engine still runs it, but for the record
            member = None
        if member is None:
            member = self._note(arrival)
        elif parted := self._parts.unplanned(member):
            parted.may_run(member)
            return
        self._intake.arrive(member, arrival.shareable)
        self._look_again |= bool(self.texts) or self._intake.waits_in("yielding")

    def departed(self, requests: Iterable[Request]) -> None:
        """Requests do not wait any more, and have not run: aborted, or timed out."""
        for request in requests:
            self.ended(request, "abort")

    def _note(self, arrival: Arrival) -> Member:
        self._ledger.arrived(arrival.request)
        return note(arrival.request, arrival.turn, arrival.ask)

    def _plan(
        self,
        members: Sequence[Member],
        whole: bool,
        instead_of: Batch | None = None,
        shard: Shard | None = None,
    ) -> Batch:
        batch = Batch(
            members,
            self._store,
            self._limits.page_size,
            whole,
            self._lengths,
            -1 if whole else self._gathered_row,
            self._ledger.pinned,
            self._row_memory,
            self._limits.windows,
        )
        self._ledger.planned(batch, instead_of, shard)
        return batch

    def _plan_parts(self) -> list[Request]:
        """Plan lists that come in parts, if it is time; returns the requests that run and are in
        another plan now."""
        planned = self._parts.plan_due()
        for member in planned.waiting:
            self._intake.arrive(member, shareable=True)
        for batch in planned.complete:
            self._retire_if_done(batch)
        self._look_again |= planned.anew
        return planned.moved

    def _start_again(self, member: Member) -> None:
        """It runs, and by another plan than before."""
        self._running.remove(member)
        self._start(member)

    @property
    def pinned_tokens(self) -> int:
        """Tokens held by pins, of all batches."""
        return self._ledger.pinned_tokens

    @property
    def pinned_in_windows(self) -> int:
        """Those of them that are held in the window pool."""
        return self._ledger.pinned_in_windows

    # Programs

    def release_texts(self, batch: str, programs: Mapping[int, bool] | None) -> None:
        """These programs of a list send no more requests, or none of it does; see
        `HeldTexts.release`."""
        self.texts.release(batch, programs)
        if not self.texts.goes_on(batch):
            for one in self._ledger.lists:
                if one.name == batch:
                    one.stop_continuing()
                    self._running.kept[self._running.batch == one.number] = False
        self._look_again = True

    def forget_cached(self) -> None:
        """The cache was flushed."""
        self.texts.clear()

    # A step

    def choose(self, view: View) -> Decision:
        """Claim the requests that the next prefill may take; `launched` must follow."""
        self._ledger.kv_in_use(self._limits.capacity - view.available)
        self._rescue.look(view)
        regrouped = self._plan_parts()
        rides = self._may_ride(view)
        alternates = self._prefilled and not view.chunk_left and not rides
        if alternates and short.decode_next(self._running.max_output, view.decoding):
            return Decision(full=view.full, regrouped=regrouped)
        full = view.full and not self._look_again
        self._look_again = False
        decision = Decision(full=full, regrouped=regrouped)
        if self._intake.waits and not full:
            self._chosen, refused = self._choose(view, view.decoding if rides else 0)
            if self._chosen:
                self._to_prefill = view.chunk_next + sum(map(tokens_to_prefill, self._chosen))
            decision.requests = [member.request for member in self._chosen]
            self._pressed = refused
            expired = 0
            if refused and self.texts:
                expired = self._agree(self.texts.num_expired())
                self.texts.release_oldest(expired)
            if refused and not self._chosen and not expired and not self._intake.gathering:
                decision.full = len(self._running) > 0
        elif not self._intake.waits:
            self._pressed = False
        decision.mixed = rides and self._may_mix(view)
        return decision

    def _choose(self, view: View, riding: int) -> tuple[list[Member], bool]:
        """riding: requests that may decode in the same step."""
        self._intake.close_gatherings()
        used = self._limits.capacity - view.available + view.chunk_left
        forecast = MemoryForecast(self._limits.capacity, used)
        lookahead = Lookahead(
            self._running,
            self._lengths,
            forecast,
            self._intake.batches_waiting(),
            self._gathered_row,
            self._window_forecast(view),
        )
        chosen = self._lanes.choose(
            lookahead,
            forecast,
            self.pinned_tokens,
            self._limits.chunk - view.chunk_next - riding,
            view.max_requests,
        )
        return chosen, forecast.refused

    def _window_forecast(self, view: View) -> WindowForecast | StateSlots | None:
        pool, pinned = self._limits.windows, self._ledger.pinned_in_windows
        if pool is None:
            return None
        if pool.recurrent:
            return StateSlots(pool.capacity, view.window_available, self._claims, pinned)
        used = pool.capacity - view.window_available + min(view.chunk_left, pool.window)
        return WindowForecast(pool, used, pinned)

    def _may_ride(self, view: View) -> bool:
        """Whether those that decode may do so in the next step if it prefills: they count as tokens
        of a chunk, and must leave some of it."""
        if not view.rides or not 0 < view.decoding < self._limits.chunk:
            return False
        if self._limits.mixes == "short":
            full = self._to_prefill >= self._limits.chunk * short.FULL
            if not (full and short.all_are(self._running.max_output)):
                return False
        decode_tokens = view.decoding * self._limits.page_size
        return self._limits.mixes != "none" and view.available >= self._limits.chunk + decode_tokens

    def _may_mix(self, view: View) -> bool:
        """SGLang retracts only in steps without prefill, so memory must suffice for both parts; and
        it does not mix where logprobs of prompts are computed."""
        if self._rows_follow or any(member.lead for member in self._chosen):
            return False
        tokens = view.chunk_left + sum(map(tokens_to_prefill, self._chosen))
        slack = self._limits.page_size * (len(self._chosen) + 1 + view.decoding)
        available = view.available
        windows = self._limits.windows
        if windows is not None and not windows.recurrent:
            available = min(available, view.window_available)
        return available >= min(tokens, self._limits.chunk) + slack

    def launched(self, prefilled: Sequence[tuple[Request, int]], idle: bool) -> None:
        """The next step prefills these requests, if any, each of which had so many prompt tokens in
        the cache; others that were chosen still wait.

        idle: nothing else decodes or is prefilled either.
        """
        chosen, self._chosen = self._chosen, []
        members: list[Member] = []
        for request, matched in prefilled:
            member = member_of(request)
            if member is not None:
                members.append(member)
                if member.slot < 0:
                    member.matched = matched
                    self._start(member)
        for member in chosen:
            if member.slot < 0 and member.batch is not None:
                member.batch.pins.unclaim(member)
        self._lanes.started(member for member in chosen if member.slot >= 0)
        for member in members:
            if member.batch is not None and (member.claimed or member.batch.opening):
                member.batch.pins.publish(member, self._store.publish(member.request))
                self._ledger.published(member.batch)
        self._prefilled = bool(members)
        if members:
            self._rows_follow = any(member.lead for member in members)
            self._claims = sum(len(member.claimed) for member in members)
        if chosen and not prefilled and idle and not self.texts and not len(self._running):
            self._rescue.give_up_pins(chosen[0])

    def _start(self, member: Member) -> None:
        batch, request = member.batch, member.request
        if batch is None:
            self._intake.depart(member)
            self._running.add(
                member,
                hint=hinted_output(request.rid),
                max_output=request.sampling_params.max_new_tokens or 0,
                own=len(request.origin_input_ids),
                row=self._gathered_row,
                batch=-1,
                home=-1,
                home_depth=0,
                kept=False,
                at_root=False,
            )
            return
        batch.start(member)
        index, home = member.index, member.home
        again = batch.computed_again(member)
        self._ledger.computed_again(batch, again)
        self._running.add(
            member,
            hint=batch.hints[index],
            max_output=batch.max_output[index],
            own=batch.own_tokens[index] + again,
            row=batch.length_rows[index],
            batch=batch.number,
            home=batch.node_id(home) if home != ROOT else -1,
            home_depth=batch.pins.depth[home],
            kept=batch.continued[index],
            at_root=batch.pins.parent[home] == ROOT,
        )

    def make_way(self, request: Request) -> None:
        """See `Rescue.make_way`."""
        self._rescue.make_way(request)

    def make_room(self, fits: Callable[[], bool], decoding: Sequence[Request]) -> None:
        """See `Rescue.make_room`."""
        self._rescue.make_room(fits, decoding)

    # Ends

    def keeps(self, request: Request) -> bool:
        """Whether the KV of a request that ends is to stay in the cache, first to be evicted; see
        `Batch.keeps`."""
        member = member_of(request)
        batch = None if member is None else member.batch
        return batch is None or batch.keeps(request, self._pressed)

    def texts_go_on(self) -> bool:
        """Whether a request runs whose text a program is expected to continue."""
        return bool(self._running.kept.any())

    def ended(self, request: Request, end: End | None, text: array[int] | None = None) -> None:
        """The request has given its KV back, if it had any: it has ended, or (None) was retracted.

        text: its token ids, prompt and output, as far as they are cached now.
        """
        member = member_of(request)
        if member is None:
            return
        ran = member.slot >= 0
        self._running.remove(member)
        batch = member.batch
        if end is None:
            self._ledger.retracted(batch)
            if batch is not None:
                batch.stop(member, ran)
            return
        turn = member.turn
        if text is not None and turn is not None and turn.kind != "once" and end != "abort":
            self.texts.hold(turn, text, request.extra_key)
        if request.output_ids:
            row = self._gathered_row if batch is None else int(batch.length_rows[member.index])
            self._lengths.add(row, end, len(request.output_ids))
        self._ledger.ended(request, end, batch)
        if batch is None:
            self._intake.depart(member)
        else:
            batch.end(member, ran, free=batch.private and self._pressed)
            self._retire_if_done(batch)
        forget(request)

    def _retire_if_done(self, batch: Batch) -> None:
        if not batch.unfinished and not batch.opening:
            batch.give_back_rows(self._lengths)
            self._ledger.retired(batch)

    # What others ask

    def shared_path(self, request: Request, shared: int) -> SharedPath:
        """See `SharedPaths.of`."""
        member = member_of(request)
        if member is None or member.batch is None:
            return []
        return member.batch.paths.of(member.home, shared)

    def serves_others(self) -> bool:
        """Whether anything runs or waits but lists that come in parts, and those that yield."""
        running = (member.batch for member in self._running.members)
        batches = [*running, *self._intake.batches_waiting()]
        return (
            self._intake.gathering
            or self._intake.waits_in("single")
            or any(batch is None or not (batch.opening or batch.yields) for batch in batches)
        )

    def rest(self) -> None:
        """There is nothing to run."""
        self._ledger.rest()

    def report(self) -> dict[str, Any]:
        """See `Ledger.report`."""
        return self._ledger.report() | {
            "logprob_bytes": {"now": self._row_memory.used, "peak": self._row_memory.peak}
        }
