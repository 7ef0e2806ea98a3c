"""Experts that are spread over ranks, for the CPU reference platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def leave_out_others(
    stock: Callable[..., torch.Tensor], layer: Any, x: torch.Tensor, chosen: Any, *args: Any
) -> torch.Tensor:
    """``moe_forward_native``, which knows no experts of other ranks: they have the number -1. It
    counts a token once for each expert, so that in their place come such of this rank as the token
    has not chosen, with a weight of 0.

    x: [tokens, dim]; chosen: of each token, experts' weights and numbers, [tokens, experts], no
    more than the rank has.
    """
    others = chosen.topk_ids < 0
    taken = x.new_zeros(len(x), len(layer.w13_weight) + 1, dtype=torch.bool)
    taken.scatter_(1, chosen.topk_ids.long().remainder(taken.shape[1]), True)
    free = taken[:, :-1].int().argsort(dim=1, stable=True)
    stand_ins = free.gather(1, (others.cumsum(1) - 1).clamp(min=0)).to(chosen.topk_ids.dtype)
    ids = torch.where(others, stand_ins, chosen.topk_ids)
    weights = chosen.topk_weights.masked_fill(others, 0.0)
    return stock(layer, x, chosen._replace(topk_weights=weights, topk_ids=ids), *args)
