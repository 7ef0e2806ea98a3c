"""The decode attention of this package and of its rivals, each as a function of one layer's KV.

A contender takes `Inputs` and returns what it does once a step, or None, and the attention of one
layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from attention_shapes import DIM, HEADS, KV_HEADS, Inputs
from sglang_batchllm.attention.fused import FusedDecode, KernelConfigs, choose_configs
from sglang_batchllm.attention.worklist import WorkList, WorkListConfig

Attention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_list(
    inputs: Inputs, configs: KernelConfigs, kv_heads: int, **tuning: int | None
) -> tuple[WorkList, Callable[[], None]]:
    """A work list, and what builds it for the inputs."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    few, many = (processors * config.programs_per_sm for config in configs)
    lanes = inputs.q.shape[1] // kv_heads
    work = WorkList(
        WorkListConfig(
            kv_heads,
            configs.few.block_m_small // lanes,
            configs.few.block_m_large // lanes,
            few,
            many,
            **tuning,
        ),
        max(inputs.q.shape[0], 1024),
        max(inputs.req_to_token.shape[0], 2048),
        2 * inputs.unique_tokens,
        "cuda",
    )

    def build() -> None:
        work.build(
            inputs.rows,
            inputs.seq_lens,
            inputs.table.group_id,
            inputs.table.prefix_len,
            inputs.req_to_token,
            inputs.table.levels,
        )

    return work, build


def make_ours(inputs: Inputs, **tuning: int) -> tuple[Callable[[], None], Attention]:
    memory = torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor
    configs = choose_configs(torch.bfloat16, DIM, HEADS // KV_HEADS, memory)
    work, build = make_list(inputs, configs, KV_HEADS, **tuning)
    fused = FusedDecode(configs, work, HEADS, KV_HEADS, DIM, torch.bfloat16, "cuda")
    return build, attention_of(fused, inputs)


def attention_of(fused: FusedDecode, inputs: Inputs) -> Attention:
    out = inputs.q.new_empty(*inputs.q.shape[:2], fused.head_dim)

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fused(inputs.q, k, v, out, inputs.req_to_token, inputs.scale)

    return attention


def make_fa3(inputs: Inputs, window: int | None = None) -> tuple[None, Attention]:
    """window: tokens that a query sees. SGLang prepares fa3's schedule for layers without one."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

    batch = inputs.q.shape[0]
    page_table = inputs.req_to_token[inputs.rows].contiguous()
    lengths = inputs.seq_lens.int()
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=page_table.shape[1],
        num_heads=inputs.q.shape[1],
        num_heads_k=inputs.caches[0][0].shape[1],
        headdim=inputs.q.shape[2],
        cache_seqlens=lengths,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=cu_seqlens_q,
        page_size=1,
        causal=True,
    )

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_with_kvcache(
            q=inputs.q,
            k_cache=k[:, None],
            v_cache=v[:, None],
            page_table=page_table,
            cache_seqlens=lengths,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=1,
            softmax_scale=inputs.scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            scheduler_metadata=metadata if window is None else None,
        )

    return None, attention


def _flat_indices(inputs: Inputs, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """indptr int32 [batch + 1] and slots int32 of the requests in ``order``."""
    lengths = inputs.seq_lens[order].int()
    indptr = torch.zeros(len(order) + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = lengths.cumsum(0)
    table = inputs.req_to_token[inputs.rows[order]]
    inside = torch.arange(table.shape[1], device="cuda")[None] < lengths[:, None]
    return indptr, table[inside].contiguous()


def make_flashinfer(inputs: Inputs) -> tuple[None, Attention]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    indptr, indices = _flat_indices(inputs, list(range(inputs.q.shape[0])))
    workspace = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    last = torch.ones(inputs.q.shape[0], dtype=torch.int32, device="cuda")
    wrapper.plan(
        indptr,
        indices,
        last,
        HEADS,
        KV_HEADS,
        DIM,
        1,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return wrapper.run(inputs.q, (k[:, None], v[:, None]))

    return None, attention


def make_cascade(inputs: Inputs) -> tuple[None, Attention]:
    from flashinfer import MultiLevelCascadeAttentionWrapper

    order = [i for members in inputs.members for i in members]
    table = inputs.req_to_token[inputs.rows[order]]
    lengths = inputs.seq_lens[order].int()
    counts = torch.tensor([len(m) for m in inputs.members])
    prefix = torch.tensor(inputs.prefixes)
    device = "cuda"

    def pointers(values: torch.Tensor) -> torch.Tensor:
        start = torch.zeros(1, dtype=torch.int64)
        return torch.cat([start, values.cpu().cumsum(0)]).int().to(device)

    first = (counts.cumsum(0) - counts).to(device)
    own_prefix = prefix.repeat_interleave(counts).to(device)
    place = torch.arange(table.shape[1], device=device)[None]
    shared = table[first][place < prefix.to(device)[:, None]]
    own = table[(place >= own_prefix[:, None]) & (place < lengths[:, None])]
    batch = len(order)
    workspace = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    ones = torch.ones(batch, dtype=torch.int32, device=device)
    wrapper.plan(
        [pointers(counts), torch.arange(batch + 1, dtype=torch.int32, device=device)],
        [pointers(prefix), pointers(lengths - own_prefix)],
        [shared, own],
        [ones[: len(counts)], ones],
        HEADS,
        KV_HEADS,
        DIM,
        1,
        q_data_type="bfloat16",
    )
    queries = inputs.q[order].contiguous()
    back = torch.empty(batch, dtype=torch.long, device=device)
    back[order] = torch.arange(batch, device=device)

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = wrapper.run(queries, (k[:, None], v[:, None]))
        return out if torch.cuda.is_current_stream_capturing() else out[back]

    return None, attention


def make_sglang_triton(inputs: Inputs) -> tuple[None, Attention]:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    batch = inputs.q.shape[0]
    indptr, indices = _flat_indices(inputs, list(range(batch)))
    most = 8  # SGLang's default for triton_attention_num_kv_splits
    splits = torch.empty(batch, dtype=torch.int32, device="cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    get_num_kv_splits_triton[(1,)](
        splits,
        inputs.seq_lens,
        batch,
        1,
        HEADS,
        KV_HEADS,
        most,
        sms,
        MAX_NUM_SEQ=max(256, triton.next_power_of_2(batch)),
    )
    logits = torch.empty((batch, HEADS, most, DIM), dtype=torch.float32, device="cuda")
    lse = torch.empty((batch, HEADS, most), dtype=torch.float32, device="cuda")
    out = torch.empty_like(inputs.q)
    indices = indices.long()

    def attention(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        decode_attention_fwd(
            inputs.q,
            k,
            v,
            out,
            indptr,
            indices,
            logits,
            lse,
            splits,
            most,
            inputs.scale,
            1.0,
            1.0,
        )
        return out

    return None, attention


CONTENDERS: dict[str, Callable[[Inputs], tuple[Callable[[], None] | None, Attention]]] = {
    "ours": make_ours,
    "fa3": make_fa3,
    "flashinfer": make_flashinfer,
    "cascade": make_cascade,
    "sglang-triton": make_sglang_triton,
}
