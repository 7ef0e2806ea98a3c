"""Runs unmodified SGLang on a machine without an accelerator, for tests and first steps.

SGLang's own CPU engine needs a kernel library whose published wheels do not import without a CUDA
driver. As an out-of-tree platform with the ``native`` dispatch key, every operator falls back to
plain torch instead: slow, exact, and the same scheduler, caches and servers as on a GPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


class CpuReferencePlatform(CpuDeviceMixin, SRTPlatform):
    """The CPU reference platform: torch-native attention, stock MHA pool and paged allocator."""

    _enum = PlatformEnum.OOT

    def get_device(self, local_rank: int = 0) -> str:  # type: ignore[override]
        return "cpu"  # SGLang concatenates and compares this with strings

    def init_backend(self) -> None:
        # torch.compile, as grammar libraries use it, would need a C++ compiler on this machine.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        server_args.device = "cpu"
        if server_args.attention_backend is None:
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "llguidance"  # xgrammar's masks need pinned memory

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_batchllm.platform.paged_allocator import CpuPagedAllocator

        return CpuPagedAllocator

    def get_dispatch_key_name(self) -> str:
        return "native"
