"""Gated delta nets of the CPU reference platform."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend

from sglang_batchllm.edge.platform.delta_rule import DeltaNet


class CpuGatedDeltaNet(DeltaNet, GDNAttnBackend):
    """A head's state decays as a whole."""

    def inputs_before(self, conv: torch.Tensor) -> torch.Tensor:
        return conv
