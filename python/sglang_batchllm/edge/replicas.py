"""Which replica of ``--dp-size`` runs which requests of a list: each gets one shard of its plan."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sglang_batchllm.edge.messages import NameTurns
from sglang_batchllm.planning import Costs, Partition, TokenTable, partition, pieces_of, plan_batch
from sglang_batchllm.policy.admission.outputs import MAX_EXPECTED_OUTPUT, hinted_output
from sglang_batchllm.policy.shards import Shard
from sglang_batchllm.server.handover import SLICE

HOLD_FROM = 2 * SLICE
"""Of a shard of so many requests a part is held back, for whoever runs out of work."""

LEAST_PIECE = 32
"""Requests that are handed out together, at least."""


class Replicas:
    """Those of one server, as its front end knows them. SGLang sends a request to the replica of
    its ``routed_dp_rank``, which callers may set, too."""

    def __init__(self, count: int, page_size: int, is_open: Callable[[str], bool]):
        """is_open: whether a request, by its id, has yet to be answered."""
        self.count = count
        self._page_size = page_size
        self._is_open = is_open
        self._running: dict[str, tuple[int, float]] = {}  # by request id: replica, seconds
        self._held: dict[str, tuple[int, float]] = {}  # the same, of those that are held back
        self._shards: dict[str, Shard] = {}  # about to be sent, by the id of their first request
        self._piece: dict[str, int] = {}  # the same: requests that are held back
        self._turns: dict[str, NameTurns] = {}  # of requests that are held back
        self._homes: dict[str, dict[int, int]] = {}  # of batches: program to replica
        self._next = 0  # replica of the samples that came last

    async def spread(self, requests: Sequence[Any]) -> None:
        """`spread_now`, while other clients are served."""
        free = _free(requests)
        if free:
            self._place(free, *await asyncio.to_thread(self._cut, free))

    def spread_now(self, requests: Sequence[Any]) -> None:
        """Give each tokenized request of a list its replica, as far as it has none."""
        free = _free(requests)
        if free:
            self._place(free, *self._cut(free))

    def keep_together(self, requests: Sequence[Any]) -> None:
        """Samples of one prompt go to one replica, those of the next prompt to the next one."""
        self._next = (self._next + 1) % self.count
        for request in _free(requests):
            request.routed_dp_rank = self._next

    def _cut(self, requests: Sequence[Any]) -> tuple[Partition, np.ndarray]:
        lengths = [len(request.input_ids) for request in requests]
        tokens = np.frombuffer(b"".join(request.input_ids for request in requests), np.int64)
        outputs = np.array([_expected_output(request) for request in requests], np.int64)
        plan = plan_batch(
            TokenTable(tokens, np.cumsum([0, *lengths])),
            self._page_size,
            outputs,
            namespaces=[_namespace(request) for request in requests],
        )
        cut = partition(plan, self.count, outputs)
        pieces = pieces_of(plan, cut.shard_of, self.count, outputs, HOLD_FROM, LEAST_PIECE, Costs())
        return cut, pieces

    def _place(self, requests: Sequence[Any], cut: Partition, piece_of: np.ndarray) -> None:
        """The longest shard goes to the replica that has least left to do."""
        left = self.left() + self.held()
        replica_of = np.empty(self.count, np.int64)
        replica_of[np.argsort(-cut.seconds, kind="stable")] = np.argsort(left, kind="stable")
        each = cut.seconds / np.maximum(np.bincount(cut.shard_of, minlength=self.count), 1)
        name = str(requests[0].rid)
        seen: set[tuple[int, int]] = set()
        for request, shard, piece in zip(
            requests, cut.shard_of.tolist(), piece_of.tolist(), strict=True
        ):
            rid = str(request.rid)
            replica = request.routed_dp_rank = int(replica_of[shard])
            if piece:
                self._piece[rid] = piece
            (self._held if piece else self._running)[rid] = replica, float(each[shard])
            if (replica, piece) not in seen:
                seen.add((replica, piece))
                self._shards[rid] = Shard(name, replica, cut.repeated_tokens)

    def left(self) -> np.ndarray:
        """Predicted seconds of what each replica has been sent and has not answered;
        float64[count]."""
        self._running = {rid: entry for rid, entry in self._running.items() if self._is_open(rid)}
        return self._sum(self._running)

    def held(self) -> np.ndarray:
        """Predicted seconds of what is held back for each; float64[count]."""
        return self._sum(self._held)

    def _sum(self, entries: dict[str, tuple[int, float]]) -> np.ndarray:
        total = np.zeros(self.count)
        for replica, seconds in entries.values():
            total[replica] += seconds
        return total

    def move(self, rids: Sequence[str], replica: int) -> NameTurns | None:
        """These, which were held back together, go to the replica; returns what it has to know of
        first."""
        told = None
        for rid in rids:
            _, seconds = self._held.pop(rid)
            self._running[rid] = replica, seconds
            turn = self._turns.pop(rid, None)
            if told is None:
                told = turn
            elif turn is not None:
                told.turns.update(turn.turns)
        if told is not None:
            told.replica = replica
            self._settle(told)
        return told

    def shards(self, requests: Sequence[Any]) -> Iterator[tuple[list[Any], Shard | None, bool]]:
        """What each replica gets of a list, what is held back of that being apart (and True);
        requests without a replica, each by itself."""
        by_piece: dict[tuple[int | None, int], list[Any]] = {}
        for request in requests:
            piece = self._piece.pop(str(request.rid), 0)
            by_piece.setdefault((request.routed_dp_rank, piece), []).append(request)
        for (replica, piece), mine in sorted(by_piece.items(), key=lambda entry: entry[0][1]):
            if replica is None:
                for request in mine:
                    yield [request], None, False
            else:
                first = str(mine[0].rid)
                yield mine, self._shards.pop(first, Shard(first, replica, 0)), piece > 0

    # Programs, which go on where their texts are

    def turns(
        self, batch: str, turns: dict[str, tuple[str, int]], yields: bool, requests: Sequence[Any]
    ) -> Iterator[NameTurns]:
        """What each replica has to know of before the requests come, as far as they have one."""
        known: dict[int, dict[str, tuple[str, int]]] = {}
        for request in requests:
            rid, replica = str(request.rid), request.routed_dp_rank
            if rid in self._piece:
                turn = {rid: turns[rid]}
                self._turns[rid] = NameTurns(batch=batch, turns=turn, yields=yields)
            elif replica is not None:
                known.setdefault(replica, {})[rid] = turns[rid]
        for replica, told in known.items():
            message = NameTurns(batch=batch, turns=told, yields=yields, replica=replica)
            self._settle(message)
            yield message

    def _settle(self, message: NameTurns) -> None:
        assert message.replica is not None
        for kind, program in message.turns.values():
            if kind == "first":
                self._homes.setdefault(message.batch, {})[program] = message.replica

    def home(self, batch: str, program: int) -> int | None:
        """The replica on which the program began."""
        return self._homes.get(batch, {}).get(program)

    def forget(self, batch: str) -> None:
        """Its programs have ended."""
        self._homes.pop(batch, None)


def _free(requests: Sequence[Any]) -> list[Any]:
    """Those that are token ids alone, and whose replica nobody has chosen."""
    return [
        request
        for request in requests
        if request.routed_dp_rank is None
        and request.input_ids is not None
        and request.mm_inputs is None
    ]


def _expected_output(request: Any) -> int:
    hint = hinted_output(str(request.rid))
    most = request.sampling_params.max_new_tokens or MAX_EXPECTED_OUTPUT
    return min(most if math.isnan(hint) else int(hint), most, MAX_EXPECTED_OUTPUT)


def _namespace(request: Any) -> tuple[Any, Any, Any]:
    return request.extra_key, request.lora_id, getattr(request, "cache_salt", None)
