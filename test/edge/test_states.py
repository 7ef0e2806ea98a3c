"""Copies of recurrent state take little memory beside the slots."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_batchllm.edge import states

LAYERS, SLOTS = 3, 40


def pool() -> Any:
    conv = [torch.randn(LAYERS, SLOTS, 2), torch.randn(LAYERS, SLOTS, 4)]
    cached = SimpleNamespace(temporal=torch.randn(LAYERS, SLOTS, 5, 2), conv=conv)
    return SimpleNamespace(mamba_cache=cached)


@pytest.mark.parametrize("slots_at_once", [0.5, 4, 17.9, 100])
def test_a_copy_goes_in_parts_of_some_bytes(
    slots_at_once: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pool()
    tensors = [made.mamba_cache.temporal, *made.mamba_cache.conv]
    before = [tensor.clone() for tensor in tensors]
    monkeypatch.setattr(states, "PART_BYTES", int(slots_at_once * LAYERS * (5 * 2 + 2 + 4) * 4))
    sources = torch.tensor([3, 3, 7, 0, 3, 9, 7, 3, 3, 1, 2, 3, 3, 3, 8, 9, 3, 3])
    targets = torch.arange(20, 20 + len(sources))
    parts: list[int] = []

    def copy(states: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        parts.append(len(source))
        for tensor in tensors:
            tensor[:, target] = tensor[:, source]

    states.copy_in_parts(copy, made, sources, targets)
    assert max(parts) <= max(slots_at_once, 1)
    assert len(parts) == -(-len(sources) // max(parts))
    for tensor, old in zip(tensors, before, strict=True):
        expected = old.clone()
        expected[:, targets] = old[:, sources]
        assert torch.equal(tensor, expected)
