"""Runs unmodified SGLang on a machine without an accelerator, for tests and first steps.

SGLang's own CPU engine needs a kernel library whose published wheels do not import without a CUDA
driver. As an out-of-tree platform with the ``native`` dispatch key, every operator falls back to
plain torch instead: slow, exact, and the same scheduler, caches and servers as on a GPU.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_batchllm.edge import seams

if TYPE_CHECKING:
    from sglang_batchllm.edge.seams.v0_5_17 import platform as seam
else:
    seam = seams.load("platform")


KV_TOKENS = 1 << 16
"""Of a server that is not told how many. SGLang would take nearly all memory of the machine, and
fill it with zeros, whatever the model's size."""


ATTENTION = "torch_native"
"""See `attention.CpuAttention`."""


class CpuReferencePlatform(CpuDeviceMixin, seam.PlatformParts):
    """The CPU reference platform: torch-native attention, plain pools."""

    _enum = PlatformEnum.OOT

    def get_device(self, *_: int, **__: int) -> str:  # type: ignore[override]
        return "cpu"  # SGLang concatenates and compares this with strings

    def init_backend(self) -> None:
        # torch.compile, as grammar libraries use it, would need a C++ compiler on this machine.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        loaded: Any = sys.modules.get("torch._dynamo.config")
        if loaded is not None:
            loaded.disable = True  # it has read that variable
        # The inputs that a convolution goes on from would be rounded to bfloat16.
        os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")
        # Some models ask for the device, which newer releases of torch call CUDA with no GPU there.
        module_of = torch.get_device_module
        torch.get_device_module = lambda device=None: module_of(device or "cpu")

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_args.device = "cpu"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "llguidance"  # xgrammar's masks need pinned memory
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = KV_TOKENS

    def get_default_attention_backend(self) -> str:
        return ATTENTION

    def get_dispatch_key_name(self) -> str:
        return "native"


def is_active() -> bool:
    """Whether SGLang runs on this platform."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, CpuReferencePlatform)
