"""What SGLang asks a platform for."""

from __future__ import annotations

from sglang.srt.platforms.interface import SRTPlatform


class PlatformParts(SRTPlatform):
    """The stock MHA pool, and a paged allocator without kernels."""

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_batchllm.edge.seams.v0_5_17.paged_allocator import CpuPagedAllocator

        return CpuPagedAllocator
