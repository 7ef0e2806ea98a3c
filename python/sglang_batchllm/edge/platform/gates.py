"""Gates that SGLang computes with Triton kernels alone, for the CPU reference platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def gated_norm(
    stock: Callable[..., torch.Tensor], norm: Any, x: torch.Tensor, gate: torch.Tensor, **_: Any
) -> torch.Tensor:
    """``forward`` of norms with a gate: the norm of x, times the gate. x, gate: [rows, dim]."""
    assert getattr(norm, "norm_before_gate", True)
    assert getattr(norm, "group_size", None) is None
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
    shape = torch.sigmoid if norm.activation == "sigmoid" else F.silu
    return (y * norm.weight.float() * shape(gate.float())).to(x.dtype)


def add_gated(
    stock: Callable[..., None],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shared: torch.Tensor,
    outputs: torch.Tensor,
) -> None:
    """``fused_gate_sigmoid_mul_add``: the shared expert's part is added to that of the others.
    hidden, shared, outputs: [tokens, dim]; weight: [dim], of the gate."""
    outputs += torch.sigmoid(hidden @ weight)[:, None] * shared


def multiply_gated(
    stock: Callable[..., torch.Tensor],
    x: torch.Tensor,
    gate: torch.Tensor,
    inplace: bool = False,
    **_: Any,
) -> torch.Tensor:
    """``fused_sigmoid_mul``: attention's outputs times their gates. x: [tokens, dim]; gate: the
    same, or [tokens, heads, head dim]."""
    weights = torch.sigmoid(gate.reshape(x.shape))
    return x.mul_(weights) if inplace else x * weights
