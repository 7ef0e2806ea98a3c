"""Prefix-shared decode attention: the groups' table, the kernel and SGLang's backend ``batchllm``.

``create_batchllm_backend`` is the factory to register under SGLang's attention backends;
``get_group_table`` is where the runtime says which requests share a prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_batchllm.attention.groups import GroupTable, get_group_table

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

__all__ = ["GroupTable", "create_batchllm_backend", "get_group_table"]


def create_batchllm_backend(model_runner: Any) -> AttentionBackend:
    """The factory for ``register_attention_backend("batchllm")``; see ``backend.py``."""
    # Imported here: the runtime needs the table alone, not Triton and SGLang's attention layers.
    from sglang_batchllm.attention.backend import create_batchllm_backend as create

    return create(model_runner)
