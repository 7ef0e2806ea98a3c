"""Which replica of ``--dp-size`` runs which requests of a list: each gets one shard of its plan."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sglang_batchllm.planning import Partition, TokenTable, partition, plan_batch
from sglang_batchllm.policy.admission.outputs import MAX_EXPECTED_OUTPUT, hinted_output
from sglang_batchllm.policy.shards import Shard


class Replicas:
    """Those of one server, as its front end knows them. SGLang sends a request to the replica of
    its ``routed_dp_rank``, which callers may set, too."""

    def __init__(self, count: int, page_size: int, is_open: Callable[[str], bool]):
        """is_open: whether a request, by its id, has yet to be answered."""
        self._count = count
        self._page_size = page_size
        self._is_open = is_open
        self._running: dict[str, tuple[int, float]] = {}  # by request id: replica, seconds
        self._shards: dict[str, Shard] = {}  # about to be sent, by the id of their first request
        self._homes: dict[str, dict[int, int]] = {}  # of batches: program to replica

    async def spread(self, requests: Sequence[Any]) -> None:
        """`spread_now`, while other clients are served."""
        free = _free(requests)
        if free:
            self._place(free, await asyncio.to_thread(self._cut, free))

    def spread_now(self, requests: Sequence[Any]) -> None:
        """Give each tokenized request of a list its replica, as far as it has none."""
        free = _free(requests)
        if free:
            self._place(free, self._cut(free))

    def _cut(self, requests: Sequence[Any]) -> Partition:
        lengths = [len(request.input_ids) for request in requests]
        tokens = np.frombuffer(b"".join(request.input_ids for request in requests), np.int64)
        outputs = np.array([_expected_output(request) for request in requests], np.int64)
        plan = plan_batch(
            TokenTable(tokens, np.cumsum([0, *lengths])),
            self._page_size,
            outputs,
            namespaces=[_namespace(request) for request in requests],
        )
        return partition(plan, self._count, outputs)

    def _place(self, requests: Sequence[Any], cut: Partition) -> None:
        """The longest shard goes to the replica that has least left to do."""
        self._running = {rid: entry for rid, entry in self._running.items() if self._is_open(rid)}
        left = np.zeros(self._count)
        for replica, seconds in self._running.values():
            left[replica] += seconds
        replica_of = np.empty(self._count, np.int64)
        replica_of[np.argsort(-cut.seconds, kind="stable")] = np.argsort(left, kind="stable")
        each = cut.seconds / np.maximum(np.bincount(cut.shard_of, minlength=self._count), 1)
        name = str(requests[0].rid)
        seen: set[int] = set()
        for request, shard in zip(requests, cut.shard_of.tolist(), strict=True):
            replica = request.routed_dp_rank = int(replica_of[shard])
            self._running[str(request.rid)] = replica, float(each[shard])
            if replica not in seen:
                seen.add(replica)
                self._shards[str(request.rid)] = Shard(name, replica, cut.repeated_tokens)

    def shards(self, requests: Sequence[Any]) -> Iterator[tuple[list[Any], Shard | None]]:
        """What each replica gets of a list; requests without one, each by itself."""
        by_replica: dict[int | None, list[Any]] = {}
        for request in requests:
            by_replica.setdefault(request.routed_dp_rank, []).append(request)
        for request in by_replica.pop(None, ()):
            yield [request], None
        for replica, mine in by_replica.items():
            shard = self._shards.pop(str(mine[0].rid), None)
            assert replica is not None
            yield mine, shard or Shard(str(mine[0].rid), replica, 0)

    # Programs, which go on where their texts are

    def settle(
        self, batch: str, turns: dict[str, tuple[str, int]], requests: Sequence[Any]
    ) -> Iterator[tuple[int, dict[str, tuple[str, int]]]]:
        """The turns that each replica has to know of, for requests that have one."""
        known: dict[int, dict[str, tuple[str, int]]] = {}
        for request in requests:
            replica = request.routed_dp_rank
            if replica is None:
                continue
            kind, program = turn = turns[request.rid]
            if kind == "first":
                self._homes.setdefault(batch, {})[program] = replica
            known.setdefault(replica, {})[request.rid] = turn
        yield from known.items()

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
