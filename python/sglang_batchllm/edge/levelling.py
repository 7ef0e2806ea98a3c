"""The tail of a spread list: what is held back goes to the replica that runs out of work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sglang_batchllm.edge.packing import PackedList
from sglang_batchllm.edge.replicas import Replicas
from sglang_batchllm.policy.shards import Shard

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.05

FEW = 4
"""A replica runs out of work when for each so many requests that run none is left that waits."""

SURE_SECONDS = 1.0
"""A replica that has said nothing for so long, and has nothing to answer, has run out of work."""


class _Held(NamedTuple):
    message: PackedList
    rids: frozenset[str]


class Levelling:
    """What is held back of lists, for each replica in the order in which it would run.

    A replica gets of its own first, and then of the one that has the most left.
    """

    def __init__(
        self, replicas: Replicas, send: Callable[[Any], None], loads: Callable[[], Iterable[Any]]
    ):
        """send: a message to its replica. loads: SGLang's latest LoadSnapshot of each."""
        self._replicas = replicas
        self._send = send
        self._loads = loads
        self._held: list[deque[_Held]] = [deque() for _ in range(replicas.count)]
        self._handed = [0.0] * replicas.count
        self._looking: asyncio.Task[None] | None = None

    def hold(self, message: PackedList, rids: Iterable[str]) -> None:
        """To be sent when a replica has time for it."""
        assert message.shard is not None
        self._held[message.shard.replica].append(_Held(message, frozenset(rids)))
        self._handed[message.shard.replica] = time.time()  # the rest of it goes now
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())

    def let_go(self, rids: Sequence[str] | None, whole: bool = True) -> None:
        """Send what holds these requests, or all, since they are to be aborted. whole: the ids are
        no beginnings of others."""
        if not any(self._held):
            return
        wanted = frozenset(rids or ())
        for replica, held in enumerate(self._held):
            for one in [*held]:
                if (
                    rids is None
                    or not wanted.isdisjoint(one.rids)
                    or (not whole and any(rid.startswith(tuple(wanted)) for rid in one.rids))
                ):
                    held.remove(one)
                    self._hand_out(one, replica)

    async def _look(self) -> None:
        try:
            while any(self._held):
                await asyncio.sleep(LOOK_SECONDS)
                self._level()
        except Exception:
            logger.exception("batchllm: levelling failed; what was held back of lists is sent")
            self.let_go(None)
        finally:
            self._looking = None

    def _level(self) -> None:
        loads = {load.dp_rank: load for load in self._loads()}
        for replica, handed in enumerate(self._handed):
            load = loads.get(replica)
            if load is not None and load.timestamp > handed + LOOK_SECONDS:
                if load.num_waiting_reqs * FEW > load.num_running_reqs:
                    continue
            elif time.time() - handed < SURE_SECONDS or self._replicas.left()[replica]:
                continue
            if self._held[replica]:
                self._hand_out(self._held[replica].popleft(), replica)
                continue
            held = self._replicas.held()
            longest = int(np.where(held > 0, held + self._replicas.left(), 0.0).argmax())
            if self._held[longest]:
                self._hand_out(self._held[longest].pop(), replica)

    def _hand_out(self, held: _Held, replica: int) -> None:
        message, shard = held.message, held.message.shard
        assert shard is not None
        message.shard = Shard(shard.name, replica, shard.repeated_tokens)
        message.common["routed_dp_rank"] = replica
        if (told := self._replicas.move([*held.rids], replica)) is not None:
            self._send(told)
        self._send(message)
        self._handed[replica] = time.time()
