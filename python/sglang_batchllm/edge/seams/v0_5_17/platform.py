"""What SGLang asks a platform for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.platforms.interface import SRTPlatform


class PlatformParts(SRTPlatform):
    """The stock MHA pool, and a paged allocator without kernels."""

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from sglang_batchllm.edge.seams.v0_5_17.paged_allocator import CpuPagedAllocator

        return CpuPagedAllocator


def _build_pool(stock: Callable[..., Any], configurator: Any, *, sizes: Any, **options: Any) -> Any:
    """SGLang asks a platform for one plain pool, whatever the model's kind."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if configurator.is_hybrid_swa:
        return configurator._build_hybrid_swa_kv_pool(
            full_max_total_num_tokens=sizes.full_max_total_num_tokens,
            swa_max_total_num_tokens=sizes.swa_max_total_num_tokens,
            mha_pool_class=MHATokenToKVPool,
        )
    if configurator.use_mla_backend and not options["is_dsa_model"]:
        return configurator._build_mla_kv_pool(max_total_num_tokens=sizes.max_total_num_tokens)
    return stock(configurator, sizes=sizes, **options)


def _build_allocator(
    stock: Callable[..., Any], configurator: Any, *, sizes: Any, **options: Any
) -> Any:
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    pool = options["token_to_kv_pool"]
    if not configurator.is_hybrid_swa:
        return stock(configurator, sizes=sizes, **options)
    if pool.page_size > 1:
        raise ValueError(
            f"On a CPU, SGLang 0.5.17 has no allocator of pages for models with a pool for "
            f"sliding-window layers (--page-size {pool.page_size}); pass --page-size 1."
        )
    return SWATokenToKVPoolAllocator(
        sizes.full_max_total_num_tokens,
        sizes.swa_max_total_num_tokens,
        page_size=pool.page_size,
        dtype=configurator.kv_cache_dtype,
        device=configurator.device,
        kvcache=pool,
        need_sort=False,
    )


HOOKS: dict[str, Callable[..., Any]] = {
    "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool": _build_pool,
    "srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator": (
        _build_allocator
    ),
}
"""What is wrapped while this platform is on; `plugin.py` does it."""
