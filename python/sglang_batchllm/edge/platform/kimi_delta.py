"""Kimi's delta attention of the CPU reference platform."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.linear.kda_backend import KDAAttnBackend

from sglang_batchllm.edge.platform.delta_rule import DeltaNet


class CpuKimiDelta(DeltaNet, KDAAttnBackend):
    """A head's state decays at a rate for each key dim."""

    def inputs_before(self, conv: torch.Tensor) -> torch.Tensor:
        return conv.T
