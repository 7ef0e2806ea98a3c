"""Copies between a GPU and the host that wait for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def pinned(values: Sequence[int] | np.ndarray) -> torch.Tensor:
    """int64 [values], in memory that a GPU copies from by itself."""
    tensor = torch.from_numpy(np.asarray(values, np.int64))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def to_device(values: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 [values] on `device`, for what is launched after this."""
    return pinned(values).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Its copy, which is not there before what was launched until now has run."""
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
