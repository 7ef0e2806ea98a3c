"""Slots for the states of recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def slots_per_request(stock: Callable[[Any], int], configurator: Any) -> int:
    """How many there are for each that may run. SGLang has three, for copies that its cache may
    want; here a request has one, and those of shared prefixes are forecast beside it."""
    return 1 if getattr(configurator.server_args, "batchllm", False) else stock(configurator)
