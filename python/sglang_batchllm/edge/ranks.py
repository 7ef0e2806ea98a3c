"""The ranks of a model under tensor parallelism: each plans by itself, from the same requests."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from sglang.srt.utils import broadcast_pyobj

T = TypeVar("T")


class Ranks:
    """messages: that planning has sent so far, beside SGLang's own."""

    def __init__(self, ranks: Sequence[int], own: int, cpu_group: Any, checks: bool):
        """ranks, own: of all processes of the model, and of this one. checks: see `assert_same`."""
        self._ranks = ranks
        self._own = own
        self._group = cpu_group
        self._checks = checks and len(ranks) > 1
        self.messages = 0

    def agree(self, decision: T) -> T:
        """The decision of the first rank; clocks differ between ranks, batches must not."""
        if len(self._ranks) == 1:
            return decision
        self.messages += 1
        return broadcast_pyobj([decision], self._own, self._group, src=self._ranks[0])[0]

    def assert_same(self, chosen: Iterable[str]) -> None:
        """Raises RuntimeError on all ranks where they have not chosen the same requests, with which
        they would wait for each other for ever. Costs eight bytes a rank, and a round."""
        if not self._checks:
            return
        chosen = list(chosen)
        digest = torch.tensor([zlib.crc32("\n".join(chosen).encode())])
        digests = [torch.empty_like(digest) for _ in self._ranks]
        torch.distributed.all_gather(digests, digest, group=self._group)
        others = [rank for rank, one in zip(self._ranks, digests, strict=True) if one != digests[0]]
        if others:
            raise RuntimeError(
                f"ranks {others} would prefill other requests than rank {self._ranks[0]}, this one "
                f"(rank {self._own}) {chosen[:4]} and so on, {len(chosen)} in all: please "
                "report it with the requests that were sent"
            )
