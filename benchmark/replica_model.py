"""Replicas that work through their shards of a planned batch, some of which are slow or die.

A *unit* is what is handed out whole: the requests of one prefix group, or one that shares nothing.
A replica runs the units of its shard one after the other, each beside those that began up to
`window` seconds before it ends. Without levelling a replica has its whole shard from the beginning.
With it, it has as much as it runs in `ahead` seconds, and the coordinator keeps the rest: who runs
out gets units off the end of what is kept for the replica that would take the longest. The
coordinator serves one replica after the other.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_batchllm.planning import BatchPlan, Costs, partition


@dataclass(frozen=True)
class Units:
    """The units of a planned batch, in its order: int64 or float64[n].

    shard: that has it. requests: of it. planned, seconds: that a replica takes by the plan, and by
    the outputs that come. tokens: prompt tokens that it computes. above: tokens of the prefix that
    it shares with other units, which a replica computes again that has none of these.
    """

    shard: np.ndarray
    requests: np.ndarray
    planned: np.ndarray
    seconds: np.ndarray
    tokens: np.ndarray
    above: np.ndarray
    repeated_tokens: int  # by the partition


def units_of(
    plan: BatchPlan, shards: int, expected: np.ndarray, decoded: Sequence[np.ndarray], costs: Costs
) -> Units:
    """expected: output tokens of each request by the plan. decoded: those that come, drawn as often
    as each shard is to have its units, one time after the other."""
    cut = partition(plan, shards, expected, costs)
    tree, order = plan.tree, plan.order
    group = plan.group_of[order]
    shard = cut.shard_of[order].astype(np.int64)
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (group[1:] != group[:-1]) | (group[1:] < 0) | (shard[1:] != shard[:-1])
    starts = np.flatnonzero(begins)

    lens, computed = plan.prompt_lens[order], plan.to_compute[order]
    shared = np.where(group >= 0, np.append(plan.groups.prefix_len, 0)[group], 0)
    reached = lens.astype(float) ** 2 - (lens - computed).astype(float) ** 2
    prefill = costs.prefill_token * computed + costs.pair * reached / 2

    def seconds(outputs: np.ndarray) -> np.ndarray:
        own = outputs * (costs.decode_token + costs.kv_token * (lens - shared + outputs / 2))
        prefixes = np.maximum.reduceat(outputs, starts) * costs.kv_token * shared[starts]
        return np.add.reduceat(prefill + own, starts) + prefixes

    first = order[starts]
    at = np.where(group[starts] >= 0, np.append(plan.groups.node, 0)[group[starts]], 0)
    alone = tree.request_node[first]
    above = tree.depth[tree.parent[np.where(group[starts] >= 0, at, alone)]]

    def again(values: np.ndarray) -> np.ndarray:
        return np.tile(values, len(decoded))

    return Units(
        shard=again(shard[starts]),
        requests=again(np.diff(np.append(starts, len(order)))),
        planned=again(seconds(expected[order])),
        seconds=np.concatenate([seconds(outputs[order]) for outputs in decoded]),
        tokens=again(np.add.reduceat(computed, starts)),
        above=again(np.maximum(above, 0)),
        repeated_tokens=cut.repeated_tokens * len(decoded),
    )


@dataclass(frozen=True)
class World:
    """What happens to replicas.

    slowness: of each, seconds that it takes for a second of the costs. deaths: moments (seconds)
    and replicas. restart: seconds until one that died runs again; its units that had not ended
    begin anew, there or elsewhere. window, ahead: see above. levels: whether the tail is levelled.
    per_request: seconds of the coordinator, which there is where it is levelled, for each request
    that it hands out.
    """

    slowness: np.ndarray
    deaths: list[tuple[float, int]]
    restart: float
    window: float
    ahead: float
    levels: bool
    per_request: float


@dataclass
class Outcome:
    """seconds: until all has ended. best: that no assignment could beat without deaths. lost: of
    replicas, in which what they did was lost or they did not run. repeated_tokens: prompt tokens
    computed again, beyond the partition's. handed_out: messages of the coordinator. coordinating:
    seconds that it was at work."""

    seconds: float = 0.0
    best: float = 0.0
    lost: float = 0.0
    repeated_tokens: int = 0
    handed_out: int = 0
    coordinating: float = 0.0

    @property
    def efficiency(self) -> float:
        return self.best / self.seconds


@dataclass
class _Replica:
    """kept: units that the coordinator has for it. given: units that have not begun, and the
    moments at which it has them. begun: units and the moments at which they end; the last is the
    one that is added to. free: when it begins the next unit. left: planned seconds of kept."""

    slowness: float
    kept: deque[int] = field(default_factory=deque)
    given: deque[tuple[int, float]] = field(default_factory=deque)
    begun: deque[tuple[int, float]] = field(default_factory=deque)
    free: float = 0.0
    left: float = 0.0
    turn: int = 0  # an entry of the agenda with another is void


def play(units: Units, world: World) -> Outcome:
    """Run all units to the end."""
    replicas = [_Replica(float(slowness)) for slowness in world.slowness]
    for unit, shard in enumerate(units.shard.tolist()):
        replicas[shard].kept.append(unit)
        replicas[shard].left += float(units.planned[unit])
    outcome = Outcome(best=float(units.seconds.sum() / (1 / world.slowness).sum()))
    coordinator = _Coordinator(units, world, replicas, outcome)
    agenda: list[tuple[float, int, int]] = []  # moment, replica, turn; -1 for a death
    for moment, number in world.deaths:
        heapq.heappush(agenda, (moment, number, -1))
    for number, replica in enumerate(replicas):
        coordinator.refill(replica, 0.0)
        heapq.heappush(agenda, (0.0, number, replica.turn))
    while agenda:
        now, number, turn = heapq.heappop(agenda)
        replica = replicas[number]
        if turn == -1:
            if any(one.kept or one.given or one.free > now for one in replicas):
                _die(replica, now, units, world, outcome)
                heapq.heappush(agenda, (replica.free, number, replica.turn))
                for other, one in enumerate(replicas):
                    if one.free <= now:  # it had nothing to do
                        heapq.heappush(agenda, (now, other, one.turn))
            continue
        if turn != replica.turn:
            continue
        while replica.begun and replica.begun[0][1] <= now - world.window:
            replica.begun.popleft()
        if len(replica.given) < 2:
            coordinator.refill(replica, now)
        if not replica.given:
            continue
        unit, there = replica.given.popleft()
        replica.free = max(now, there) + float(units.seconds[unit]) * replica.slowness
        replica.begun.append((unit, replica.free))
        outcome.seconds = max(outcome.seconds, replica.free)
        replica.turn += 1
        heapq.heappush(agenda, (replica.free, number, replica.turn))
    return outcome


@dataclass
class _Coordinator:
    """free: when it has handed out what it was asked for last."""

    units: Units
    world: World
    replicas: list[_Replica]
    outcome: Outcome
    free: float = 0.0

    def refill(self, replica: _Replica, now: float) -> None:
        """Give the replica of what is kept for it or, where that is nothing, for another."""
        units, levels = self.units, self.world.levels
        if not replica.kept and not replica.given and levels:
            self._take_from_another(replica)
        if not replica.kept:
            return
        ahead = self.world.ahead if levels else np.inf
        planned = 0.0
        handed: list[int] = []
        while replica.kept and planned < ahead:
            unit = replica.kept.popleft()
            handed.append(unit)
            planned += float(units.planned[unit]) * replica.slowness
            replica.left -= float(units.planned[unit])
        work = float(units.requests[handed].sum()) * self.world.per_request if levels else 0.0
        self.free = max(now, self.free) + work
        replica.given.extend((unit, self.free) for unit in handed)
        self.outcome.handed_out += 1
        self.outcome.coordinating += work

    def _take_from_another(self, replica: _Replica) -> None:
        """Half of what would take longest, off its end: it has seen how fast each is."""
        longest = max(self.replicas, key=lambda one: one.left * one.slowness)
        if not longest.kept:
            return
        share = longest.left * longest.slowness / (longest.slowness + replica.slowness)
        planned, above = self.units.planned, self.units.above
        taken = 0.0
        last = -1
        while longest.kept and (taken == 0.0 or taken + planned[longest.kept[-1]] <= share):
            unit = longest.kept.pop()
            replica.kept.appendleft(unit)
            taken += float(planned[unit])
            if last != above[unit]:  # neighbours share it
                self.outcome.repeated_tokens += int(above[unit])
                last = above[unit]
        longest.left -= taken
        replica.left += taken


def _die(replica: _Replica, now: float, units: Units, world: World, outcome: Outcome) -> None:
    """What has not ended by now, and what ended within the window's last moments, begins anew."""
    again = [unit for unit, end in replica.begun if end > now - world.window]
    replica.begun.clear()
    for unit in again:
        outcome.repeated_tokens += int(units.tokens[unit])
        outcome.lost += float(units.seconds[unit]) * replica.slowness
    back = [*again, *(unit for unit, _ in replica.given)]
    replica.given.clear()
    replica.kept.extendleft(reversed(back))
    replica.left += float(units.planned[back].sum()) if back else 0.0
    outcome.lost += world.restart
    replica.free = now + world.restart
    replica.turn += 1
