"""Slots for the states of recurrent layers, and what is copied between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PART_BYTES = 256 << 20
"""Most that is copied at once: torch gathers what it copies beside the slots."""


def slots_per_request(stock: Callable[[Any], int], configurator: Any) -> int:
    """How many there are for each that may run. SGLang has three, for copies that its cache may
    want; here a request has one, and those of shared prefixes are forecast beside it."""
    return 1 if getattr(configurator.server_args, "batchllm", False) else stock(configurator)


def copy_in_parts(
    stock: Callable[..., None], states: Any, sources: torch.Tensor, targets: torch.Tensor
) -> None:
    """A pass may begin hundreds of requests, each with a copy of the state after its prefix. In one
    go that takes as much memory again: 9.5 GiB for two hundred of Qwen3.5-9B.

    sources, targets: int64[n], slots that have nothing in common.
    """
    cached = states.mamba_cache
    bytes_per_slot = sum(layers[:, :1].nbytes for layers in (cached.temporal, *cached.conv))
    count = max(PART_BYTES // bytes_per_slot, 1)
    for source, target in zip(sources.split(count), targets.split(count), strict=True):
        stock(states, source, target)
