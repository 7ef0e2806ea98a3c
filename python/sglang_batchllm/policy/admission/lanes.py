"""Who goes first: kinds of requests take turns, so that none starves.

Lists, gathered requests and single ones each have a lane; within one, the older goes first. One
lane has the turn and is asked first. Its head is either taken, and the turn passes on, or does not
fit: then nothing else is taken either, so that memory is saved up as others end, and the lane keeps
its turn until its head is in. So once a request is the head of its lane, it waits at most until all
that ran at that moment has ended, and then once more for the head of each of the two other lanes.

Lists that yield get what these leave: nothing while a head does not fit, nor a share of the memory
that is left to what comes next, and of two steps in a row that begin requests of the lanes only the
rest of the second, so that first tokens come soon and the list goes on none the less.

Later turns of programs that have begun go before all lanes, since these hold memory until they end:
whoever waits for that memory waits for them. A program that keeps it too long is dealt with in
`texts`.
"""

from __future__ import annotations

from collections.abc import Iterable

from sglang_batchllm.policy.admission.forecast import MemoryForecast
from sglang_batchllm.policy.admission.level import can_wait
from sglang_batchllm.policy.admission.lookahead import Lookahead
from sglang_batchllm.policy.batch import Batch, Member
from sglang_batchllm.policy.intake import LANES, Intake, LaneName

ROOM_FOR_OTHERS = 16
"""Lists that yield leave one token of so many to others."""


class Lanes:
    """Chooses from an intake what the KV pool can hold until it ends; see `MemoryForecast`."""

    def __init__(self, intake: Intake, capacity: int):
        """capacity: tokens of the KV pool."""
        self._intake = intake
        self._capacity = capacity
        self._turn: LaneName = LANES[0]
        self._has_yielded = False  # in the last step

    def choose(
        self,
        lookahead: Lookahead,
        forecast: MemoryForecast,
        pinned: int,
        max_tokens: int,
        max_requests: int,
    ) -> list[Member]:
        """Claim up to `max_requests` requests with about `max_tokens` tokens to prefill.

        pinned: tokens held by pins. `started` must follow.
        """
        idle = lookahead.none_run
        waiting = self._intake.batches_waiting()
        reserve = max((b.largest_need(lookahead.shown(b)) for b in waiting), default=0)
        chosen: list[Member] = []

        def may_open(tokens: int, in_windows: int, is_first: bool) -> bool:
            # What stays pinned must leave room for any request to run alone; the first of all
            # may always go when it has the pool to itself.
            nonlocal pinned
            alone = is_first and idle and not chosen
            windows = lookahead.windows
            if not alone:
                fits = pinned + tokens + reserve <= self._capacity
                if not fits or (windows and not windows.may_pin(in_windows, reserve)):
                    forecast.refused = True
                    return False
            elif windows is not None:
                windows.pin(in_windows)
            pinned += tokens
            return True

        def take(batches: Iterable[Batch]) -> None:
            nonlocal max_tokens
            for batch in batches:
                room = max_requests - len(chosen)
                if max_tokens <= 0 or room <= 0 or forecast.refused:
                    return
                if not can_wait(batch, lookahead):
                    picked = batch.select(max_tokens, room, lookahead, may_open)
                    chosen.extend(picked)
                    max_tokens -= sum(map(batch.tokens_to_prefill, picked))

        take(self._intake.lane("later").batches())
        for _ in LANES:
            if self._intake.waits_in(self._turn):
                break
            self._pass_on()
        turn = LANES.index(self._turn)
        for lane in LANES[turn:] + LANES[:turn]:
            if lane == "single":
                room = max_requests - len(chosen)
                picked = self._first_that_fit(max_tokens, room, lookahead, forecast)
                chosen += picked
                max_tokens -= sum(member.tokens for member in picked)
            else:
                take(self._intake.lane(lane).batches())
        if yielding := self._intake.lane("yielding").batches():
            self._has_yielded = bool(chosen) and not self._has_yielded
            if not self._has_yielded:
                forecast.keep(self._capacity // ROOM_FOR_OTHERS)
                if lookahead.windows is not None:
                    lookahead.windows.keep_part(ROOM_FOR_OTHERS)
                take(yielding)
        return chosen

    def started(self, members: Iterable[Member]) -> None:
        """These of the chosen ones are in the next prefill step."""
        if any(self._intake.lane_of(member) == self._turn for member in members):
            self._pass_on()

    def _pass_on(self) -> None:
        self._turn = LANES[(LANES.index(self._turn) + 1) % len(LANES)]

    def _first_that_fit(
        self, max_tokens: int, max_requests: int, lookahead: Lookahead, forecast: MemoryForecast
    ) -> list[Member]:
        picked: list[Member] = []
        for member in self._intake.single():
            if max_tokens <= 0 or len(picked) >= max_requests or forecast.refused:
                break
            if not lookahead.admit_alone(member):
                break
            picked.append(member)
            max_tokens -= member.tokens
        return picked
