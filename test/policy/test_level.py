"""When a batch's waiting requests may start later."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_batchllm.policy.admission.level import can_wait

RUNNING = [300.0] + [100.0] * 199
WAITING = [100.0] * 200


def waits(running: list[float] = RUNNING, waiting: list[float] = WAITING, **changes: Any) -> bool:
    """Steps expected of each request. By default the longest takes 300 steps, all together
    40,200, so that 134 requests a step are enough."""
    batch: Any = {"private": True, "outputs_differ": True} | changes
    batch = SimpleNamespace(
        **batch, num_running=len(running), waiting=SimpleNamespace(count=len(waiting))
    )
    lookahead: Any = SimpleNamespace(
        steps_by_whole_batch=lambda batch: (np.array(running), np.array(waiting))
    )
    return can_wait(batch, lookahead)


def test_what_can_end_with_the_longest_waits():
    assert waits()


@pytest.mark.parametrize(
    "changes",
    [
        {"running": RUNNING[:127]},  # the step is not full
        {"waiting": []},
        {"waiting": [*WAITING, 300.0]},  # this one would end last
        {"waiting": WAITING * 2},  # 200 requests a step are too few for all of these
        {"running": [100.0] * 200},  # as where requests end by themselves
        {"private": False},  # somebody may wait for each
        {"outputs_differ": False},
    ],
)
def test_nothing_else_waits(changes: dict[str, Any]):
    assert not waits(**changes)
