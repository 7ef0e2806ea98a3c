"""`partition`: which shard (a replica, a job) runs which requests of a planned batch.

A shard computes each shared prefix of its requests once, so a prefix costs as often as there are
shards with requests below it. Two ways are tried. *Whole subtrees*, those cut that take longer than
a shard, are handed out by the rule of longest processing time first (Graham 1969), and levelled by
exchanges. *Ranges* of the requests in depth-first order, which cut at most one path for each shard.
"""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass

import numpy as np

from sglang_batchllm.planning.plan import BatchPlan, check_output_lens

SLACKS = (0.0, 0.005, 0.01, 0.02)
"""By how much more than the lower bound a subtree may take that is not cut."""

WORTH = 0.01
"""Ranges, which may cut small subtrees, are taken where they make the longest shard shorter by this
part. As much longer a range may get for an end where less is shared."""

GRAIN = 256
"""Neighbours that share nothing go together up to one part of so many of a fair share."""

NEXT_TO_NOTHING = 1 / 2000
"""A path of such a part of the time of what is below it is as good as none: it may be cut there."""

LEVELLINGS = 8
"""Exchanges between shards, for each shard."""

PARTNERS = 8
"""The shortest shards, with which the longest may exchange."""


@dataclass(frozen=True)
class Costs:
    """Seconds that a shard takes, measured on one H200 for Llama-3.1-8B's shapes (performance.md,
    "Where the time goes").

    prefill_token: of a prompt token that is computed, beside attention. pair: of a computed token
    and one that it attends to. decode_token: of an output token beside attention, in full steps.
    kv_token: of reading a token's KV in a decode step.
    """

    prefill_token: float = 2.2e-5
    pair: float = 9.4e-10
    decode_token: float = 2.5e-5
    kv_token: float = 3.9e-8


@dataclass(frozen=True, eq=False)
class Partition:
    """n requests in `shards` shards.

    shard_of: int32[n]. seconds: float64[shards], predicted. computed_tokens: int64[shards], the
    distinct prompt tokens of each one's requests. repeated_tokens: by how many the shards together
    have more than the batch. lower_bound: seconds that the longest shard of any partition takes at
    least.
    """

    shard_of: np.ndarray
    seconds: np.ndarray
    computed_tokens: np.ndarray
    repeated_tokens: int
    lower_bound: float

    @property
    def balance(self) -> float:
        """The longest shard's seconds over the mean's."""
        mean = float(self.seconds.mean())
        return float(self.seconds.max()) / mean if mean else 1.0


def partition(
    plan: BatchPlan,
    shards: int,
    output_lens: np.ndarray | None = None,
    costs: Costs = Costs(),
) -> Partition:
    """Assign each request to one of `shards` shards, none of which is to take longer than others.

    output_lens: n tokens that the requests decode; None for one each. The same input gives the same
    partition. Subtrees that take less than a fair share are cut only where that makes the longest
    shard shorter by `WORTH`.

    The bound is the least L that holds what any partition has to: no request by itself, with its
    whole prompt, takes longer than L; and with k(v) the shards that have requests below node v,
    each of which takes the path down to v, P(v), and so has L - P(v) left for what is below v,
    S(v), so that k(v) >= S(v) / (L - P(v)), all shards together take at least everything once and
    each node's own cost k(v) - 1 times more.

    Raises ValueError for fewer shards than one, and for outputs as `plan_batch` does.
    """
    shards = operator.index(shards)
    if shards < 1:
        raise ValueError(f"shards is {shards}; pass 1 or more")
    outputs = check_output_lens(output_lens, len(plan.prompt_lens))
    tree = _Tree(plan, outputs, costs)
    bound = tree.lower_bound(shards)
    ranges = tree.ranges(shards)
    best = float(ranges.seconds.max(initial=0.0)), ranges, np.arange(len(ranges.start))
    for slack in SLACKS:
        pieces = tree.cut(bound * (1 + slack), tree.total / shards / GRAIN)
        shard_of = _level(pieces.seconds, _hand_out(pieces.seconds, shards), shards)
        longest = float(np.bincount(shard_of, pieces.seconds, shards).max())
        if longest <= best[0] * (1 + WORTH if best[1] is ranges else 1):
            best = longest, pieces, shard_of
    return tree.partition(best[1], best[2], shards, bound)


def evaluate(
    plan: BatchPlan,
    shard_of: np.ndarray,
    shards: int,
    output_lens: np.ndarray | None = None,
    costs: Costs = Costs(),
) -> Partition:
    """What any assignment of requests to shards takes: int[n], each 0 to shards - 1; the rest as in
    `partition`. Raises ValueError."""
    shard_of = np.asarray(shard_of)
    if shard_of.shape != plan.prompt_lens.shape:
        raise ValueError(
            f"shard_of has shape {shard_of.shape} for {len(plan.prompt_lens)} prompts; "
            "pass one shard each"
        )
    if shard_of.size and not 0 <= shard_of.min() <= shard_of.max() < shards:
        raise ValueError(
            f"shard_of has shards {shard_of.min()} to {shard_of.max()}; pass 0 to {shards - 1}"
        )
    tree = _Tree(plan, check_output_lens(output_lens, len(shard_of)), costs)
    pieces, by_place = tree.single()
    return tree.partition(pieces, shard_of[by_place], shards, tree.lower_bound(shards))


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Ranges of requests, by their place in depth-first order, that cover all. seconds: of each by
    itself, with the paths to its requests."""

    start: np.ndarray
    stop: np.ndarray
    seconds: np.ndarray


class _Tree:
    """What nodes and requests cost, in depth-first order.

    edge, path, below, alone: seconds of each node, of all down to it, of all that is strictly below
    it, requests that end at it included, and of the latter two together. total: of everything once.
    """

    def __init__(self, plan: BatchPlan, outputs: np.ndarray, costs: Costs):
        tree = self._tree = plan.tree
        self._by_place = np.argsort(tree.request_node, kind="stable")
        group = plan.group_of
        shared = np.where(group >= 0, np.append(plan.groups.prefix_len, 0)[group], 0)
        context = plan.prompt_lens - shared + outputs / 2
        own = outputs * (costs.decode_token + costs.kv_token * context)
        self._own_until = np.concatenate([[0.0], np.cumsum(own[self._by_place])])

        prompt = costs.prefill_token * tree.depth + costs.pair * tree.depth.astype(float) ** 2 / 2
        self.edge = prompt - prompt[tree.parent]
        self.edge[0] = 0.0
        longest = np.zeros(len(plan.groups.size), np.int64)
        np.maximum.at(longest, group[group >= 0], outputs[group >= 0])
        self.edge[plan.groups.node] += costs.kv_token * plan.groups.prefix_len * longest
        self.path = self._down_to()
        edge_until = np.concatenate([[0.0], np.cumsum(self.edge)])

        self._first = np.cumsum(tree.end_count) - tree.end_count
        self._stop = self._first + tree.num_requests
        behind = np.searchsorted(self._first, self._stop)  # the node after the subtree
        behind[0] = tree.num_nodes
        self.below = edge_until[behind] - edge_until[1:]
        self.below += self._own_until[self._stop] - self._own_until[self._first]
        self.alone = self.path + self.below
        self.total = float(self.below[0])
        self._longest_request = float((self.path[tree.request_node] + own).max(initial=0.0))

        # What each request, in depth-first order, shares with the one before, and adds to it.
        node = tree.request_node[self._by_place]
        self._shared = self.path[node]
        np.minimum.at(self._shared, self._first[1:], self.path[tree.parent[1:]])
        added = own[self._by_place] + self.path[node] - self._shared
        self._added_until = np.concatenate([[0.0], np.cumsum(added)])

    def _down_to(self) -> np.ndarray:
        inner, above, leaves = self._tree.inner()
        path = self.edge.copy()
        seconds = path[inner].tolist()
        up = above.tolist()
        for node in range(1, len(up)):
            seconds[node] += seconds[up[node]]
        path[inner] = seconds
        path[leaves] += path[self._tree.parent[leaves]]
        return path

    def lower_bound(self, shards: int) -> float:
        """See `partition`."""
        least = max(self.total / shards, self._longest_request)
        large = np.flatnonzero(self.alone > least)
        below, path, edge = self.below[large], self.path[large], self.edge[large]

        def holds(seconds: float) -> bool:
            left = seconds - path
            if (left <= 0).any():
                return False
            times = np.maximum(np.ceil(below / left - 1e-9), 1)
            return self.total + float(((times - 1) * edge).sum()) <= shards * seconds * (1 + 1e-12)

        low, high = least, max(least, self.total)
        if holds(low):
            return low
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return low

    def ranges(self, shards: int) -> _Pieces:
        """At most `shards` ranges, the longest as short as it can be, or up to `WORTH` longer."""
        count = len(self._by_place)

        def reach(start: int, seconds: float) -> int:
            until = self._added_until[start] + seconds - self._shared[start]
            end = int(np.searchsorted(self._added_until, until * (1 + 1e-12), side="right")) - 1
            return max(end, start)

        def holds(seconds: float) -> bool:
            start = 0
            for _ in range(shards):
                if start == count:
                    break
                start = reach(start, seconds)
            return start == count

        low = max(self.total / shards, self._longest_request)
        high = 2 * low
        while not holds(high):
            high *= 2
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        starts = []
        start = 0
        while start < count:
            starts.append(start)
            first, last = reach(start, high), reach(start, high * (1 + WORTH))
            ends = self._shared[first : last + 1]
            start = first + int(ends.argmin()) if last < count else count
        start = np.array(starts, np.int64)
        stop = np.append(start, count)[1:]
        seconds = self._added_until[stop] - self._added_until[start] + self._shared[start]
        return _Pieces(start, stop, seconds)

    def cut(self, seconds: float, grain: float) -> _Pieces:
        """The largest subtrees that take no longer, and the requests that end above them; below one
        node as many together as that allows. Below the root, where nothing is shared, only up to
        `grain`, unless a subtree of it alone is larger."""
        tree = self._tree
        is_cut = self.alone > seconds * (1 + 1e-9)
        is_cut |= self.path <= self.below * NEXT_TO_NOTHING
        is_cut &= tree.num_requests > 1
        is_cut[0] = True
        whole = np.flatnonzero(~is_cut[1:] & is_cut[tree.parent[1:]]) + 1
        cut = np.flatnonzero(is_cut)
        ends = tree.end_count[cut]
        place = np.arange(ends.sum()) - np.repeat(np.cumsum(ends) - ends, ends)
        place += np.repeat(self._first[cut], ends)
        start = np.concatenate([self._first[whole], place])
        stop = np.concatenate([self._stop[whole], place + 1])
        under = np.concatenate([tree.parent[whole], np.repeat(cut, ends)])
        own = self._own_until[place + 1] - self._own_until[place]
        cost = np.concatenate([self.alone[whole] - self.path[tree.parent[whole]], own])
        order = np.argsort(start, kind="stable")
        start, stop, under, cost = start[order], stop[order], under[order], cost[order]

        # Neighbours under one node share the path to it, so they go together while they fit.
        begins = np.ones(len(start), np.bool_)
        begins[1:] = under[1:] != under[:-1]
        runs = np.append(np.flatnonzero(begins), len(start))
        until = np.concatenate([[0.0], np.cumsum(cost)])
        cuts: list[int] = []
        for begin, end in zip(runs[:-1].tolist(), runs[1:].tolist(), strict=True):
            node = int(under[begin])
            room = (seconds - float(self.path[node]) if node else grain) * (1 + 1e-9)
            while begin < end:
                cuts.append(begin)
                fitting = int(np.searchsorted(until, until[begin] + room, side="right")) - 1
                begin = min(max(fitting, begin + 1), end)
        at = np.array(cuts, np.int64)
        after = np.append(at, len(start))[1:]
        seconds_of = until[after] - until[at] + self.path[under[at]]
        return _Pieces(start[at], stop[after - 1], seconds_of)

    def single(self) -> tuple[_Pieces, np.ndarray]:
        """Each request as a piece, and which request each is."""
        place = np.arange(len(self._by_place))
        seconds = np.diff(self._added_until) + self._shared
        return _Pieces(place, place + 1, seconds), self._by_place

    def partition(
        self, pieces: _Pieces, shard_of: np.ndarray, shards: int, bound: float
    ) -> Partition:
        """What comes of it when piece i goes to shard_of[i]."""
        of_request = np.empty(len(self._by_place), np.int32)
        of_request[self._by_place] = np.repeat(shard_of, pieces.stop - pieces.start)
        own = self._own_until[pieces.stop] - self._own_until[pieces.start]
        seconds = np.bincount(shard_of, own, shards)
        computed = np.zeros(shards, np.int64)
        edge_len = self._tree.edge_len
        first = np.searchsorted(pieces.start, self._first[1:], side="right") - 1
        after = np.searchsorted(pieces.start, self._stop[1:], side="left")
        whole = first + 1 == after
        nodes = np.flatnonzero(whole) + 1
        np.add.at(seconds, shard_of[first[whole]], self.edge[nodes])
        np.add.at(computed, shard_of[first[whole]], edge_len[nodes])
        repeated = 0
        for node in np.flatnonzero(~whole).tolist():
            users = np.unique(shard_of[first[node] : after[node]])
            seconds[users] += self.edge[node + 1]
            computed[users] += edge_len[node + 1]
            repeated += int(edge_len[node + 1]) * (len(users) - 1)
        return Partition(of_request, seconds, computed, repeated, bound)


def _hand_out(seconds: np.ndarray, shards: int) -> np.ndarray:
    """The shard of each piece: the longest first, each to the shard that has least; int64[n]."""
    shard_of = np.zeros(len(seconds), np.int64)
    loads = [(0.0, shard) for shard in range(shards)]
    for piece in np.argsort(-seconds, kind="stable").tolist():
        load, shard = loads[0]
        shard_of[piece] = shard
        heapq.heapreplace(loads, (load + float(seconds[piece]), shard))
    return shard_of


def _level(seconds: np.ndarray, shard_of: np.ndarray, shards: int) -> np.ndarray:
    """Move a piece of the longest shard to a short one, or swap it with one of that, as long as
    this makes the longer of the two shorter; int64[n], the shard of each piece."""
    shard_of = shard_of.copy()
    loads = np.bincount(shard_of, seconds, shards)
    members = np.split(
        np.argsort(shard_of, kind="stable"), np.cumsum(np.bincount(shard_of, minlength=shards))[:-1]
    )
    held = dict(enumerate(members))
    for _ in range(LEVELLINGS * shards):
        longest = int(loads.argmax())
        mine = held[longest]
        for other in np.argsort(loads, kind="stable")[:PARTNERS].tolist():
            gap = float(loads[longest] - loads[other])
            if gap <= 1e-6 * float(loads[longest]):
                break
            # What it may give for what it gets; the last stands for nothing.
            theirs = held[other][np.argsort(seconds[held[other]], kind="stable")]
            gets = np.concatenate([[0.0], seconds[theirs]])
            wanted = np.searchsorted(gets, seconds[mine] - gap / 2)
            near = np.stack([np.maximum(wanted - 1, 0), np.minimum(wanted, len(theirs))])
            off = np.abs(seconds[mine] - gets[near] - gap / 2)
            way, give = np.unravel_index(int(off.argmin()), off.shape)
            if off[way, give] >= gap / 2 * (1 - 1e-3):
                continue
            get = int(near[way, give])
            moved, back = mine[give], theirs[get - 1 : get] if get else theirs[:0]
            shard_of[moved], shard_of[back] = other, longest
            held[longest] = np.append(np.delete(mine, give), back)
            held[other] = np.append(np.setdiff1d(theirs, back), moved)
            passed = float(seconds[moved] - seconds[back].sum())
            loads[longest] -= passed
            loads[other] += passed
            break
        else:
            break
    return shard_of
