"""The names under which SGLang knows our parts."""

CACHE_BACKEND = "batchllm"
"""The cache with pinned groups, a ``--radix-cache-backend``."""

ATTENTION_BACKEND = "batchllm"
"""The fused decode attention, a ``--decode-attention-backend``."""
