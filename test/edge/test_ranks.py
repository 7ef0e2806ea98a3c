"""Ranks of one model, in two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from processes import results_of
from sglang_batchllm.edge.ranks import Ranks

CHOSEN = ["a", "b"]
OTHERS = (CHOSEN, ["b", "a"], [])


def run(meeting: str, pipe: Any) -> None:
    """In a process of its own: both ranks, the second forked; what each is told, for each of
    `OTHERS` that the second may have chosen, with and without checks."""
    second = os.fork() == 0
    own = int(second)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=own, world_size=2
    )
    for others in OTHERS:
        for checks in (True, False):
            ranks = Ranks([0, 1], own, torch.distributed.group.WORLD, checks)
            agreed = ranks.agree(f"of {own}")
            try:
                ranks.assert_same(others if second else CHOSEN)
                said = None
            except RuntimeError as error:
                said = str(error)
            pipe.send((own, others, checks, agreed, ranks.messages, said))
    if second:
        os._exit(0)
    os.wait()


def test_who_chose_otherwise_is_named_on_all_ranks(tmp_path: Path) -> None:
    told = list(results_of(run, str(tmp_path / "meeting")))
    assert len(told) == 2 * len(OTHERS) * 2
    for own, others, checks, agreed, messages, said in told:
        assert (agreed, messages) == ("of 0", 1)
        if others == CHOSEN or not checks:
            assert said is None
        else:
            assert said is not None and "ranks [1] would prefill other requests than rank 0" in said
            assert f"(rank {own})" in said
