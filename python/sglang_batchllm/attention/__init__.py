"""Prefix-shared decode attention: torch and Triton only.

In: which rows of a request pool share a prefix (`GroupTable`), and the pool's slot table. Out: the
attention of one decode step, each shared prefix read once. It may not know SGLang.
"""

from sglang_batchllm.attention.groups import GroupTable, get_group_table

__all__ = ["GroupTable", "get_group_table"]
