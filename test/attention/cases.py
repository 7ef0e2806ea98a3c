"""Random ragged decode batches for the attention tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from sglang_batchllm.attention.fused import FusedDecode, KernelConfig
from sglang_batchllm.attention.reference import reference_decode
from sglang_batchllm.attention.worklist import WorkList, WorkListConfig

TINY_CONFIG = KernelConfig(16, 16, 1, 32, 16, 1, 4, 1)


@dataclass
class Batch:
    """A decode batch. Slots that no request uses, and rows of no request, are poisoned."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    req_to_token: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    group_id: torch.Tensor
    prefix_len: torch.Tensor
    slots_used: int

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def reference(self, **kwargs: object) -> torch.Tensor:
        return reference_decode(
            self.q,
            self.k_cache,
            self.v_cache,
            self.req_to_token,
            self.rows,
            self.seq_lens,
            self.scale,
            **kwargs,  # type: ignore[arg-type]
        )


def make_batch(
    groups: list[tuple[int, list[int]]],
    num_kv_heads: int = 2,
    ratio: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    page_size: int = 1,
    padding: int = 0,
) -> Batch:
    """groups: (prefix tokens, suffix tokens of each member); ``padding`` rows of one token follow.

    Requests are in random order, and slots too, in whole pages. A group of prefix 0 is no group.
    """
    gen = torch.Generator().manual_seed(seed)
    members = sum(len(suffixes) for _, suffixes in groups)
    num_rows = members + 3
    context = max((prefix + max(suffixes) for prefix, suffixes in groups), default=1) + 2
    span = [0]

    def pages(tokens: int) -> range:
        first = span[0]
        span[0] += -(-tokens // page_size) * page_size
        return range(first, first + tokens)

    layout = [(pages(prefix), [pages(n) for n in suffixes]) for prefix, suffixes in groups]
    num_pages = span[0] // page_size
    order = (torch.randperm(num_pages, generator=gen) + 1)[:, None] * page_size
    slots = (order + torch.arange(page_size)).flatten().int()

    req_to_token = torch.full((num_rows, context), 2**30, dtype=torch.int32)
    req_to_token[0, :] = 0
    group_id = torch.zeros(num_rows, dtype=torch.int32)
    prefix_len = torch.zeros(num_rows, dtype=torch.int32)
    rows = torch.randperm(num_rows - 1, generator=gen)[:members] + 1
    seq_lens = torch.zeros(members, dtype=torch.int64)
    used = []
    i = 0
    for number, (prefix, suffixes) in enumerate(layout, start=1):
        shared = slots[prefix.start : prefix.stop]
        used.append(shared)
        for suffix in suffixes:
            row = rows[i]
            own = slots[suffix.start : suffix.stop]
            used.append(own)
            req_to_token[row, : len(prefix)] = shared
            req_to_token[row, len(prefix) : len(prefix) + len(own)] = own
            if len(prefix):
                group_id[row], prefix_len[row] = number, len(prefix)
            seq_lens[i] = len(prefix) + len(own)
            i += 1
    shuffled = torch.randperm(members, generator=gen)
    rows = torch.cat([rows[shuffled], torch.zeros(padding, dtype=rows.dtype)])
    seq_lens = torch.cat([seq_lens[shuffled], torch.ones(padding, dtype=seq_lens.dtype)])

    num_slots = (num_pages + 2) * page_size
    index = torch.cat(used).long() if used else torch.zeros(0, dtype=torch.long)
    if padding:
        index = torch.cat([index, torch.zeros(1, dtype=torch.long)])
    caches = []
    for _ in range(2):
        cache = torch.full((num_slots, num_kv_heads, head_dim), torch.nan)
        cache[index] = torch.randn(len(index), num_kv_heads, head_dim, generator=gen)
        caches.append(cache.to(kv_dtype or dtype).to(device))
    q = torch.randn(len(rows), num_kv_heads * ratio, head_dim, generator=gen).to(dtype)
    return Batch(
        q.to(device),
        caches[0],
        caches[1],
        req_to_token.to(device),
        rows.to(device),
        seq_lens.to(device),
        group_id.to(device),
        prefix_len.to(device),
        int(index.numel()),
    )


def make_fused(
    batch: Batch,
    config: KernelConfig = TINY_CONFIG,
    num_programs: int = 3,
    min_saved_tokens: int = 1,
    max_batch: int | None = None,
) -> FusedDecode:
    num_heads, head_dim = batch.q.shape[1:]
    num_kv_heads = batch.k_cache.shape[1]
    lanes = triton.next_power_of_2(num_heads // num_kv_heads)
    work = WorkList(
        WorkListConfig(
            num_kv_heads,
            max(config.block_m_small // lanes, 1),
            max(config.block_m_large // lanes, 1),
            num_programs,
            min_saved_tokens,
        ),
        max_batch or batch.q.shape[0],
        batch.req_to_token.shape[0],
        batch.k_cache.shape[0],
        batch.q.device,
    )
    return FusedDecode(
        config, work, num_heads, num_kv_heads, head_dim, batch.q.dtype, batch.q.device
    )


def run(fused: FusedDecode, batch: Batch, **kwargs: object) -> torch.Tensor:
    """Build the work list and run the kernel once, over poisoned output and workspace."""
    fused.parts.fill_(torch.nan)
    fused.part_lse.fill_(torch.nan)
    fused.work.build(
        batch.rows, batch.seq_lens, batch.group_id, batch.prefix_len, batch.req_to_token
    )
    out = torch.full_like(batch.q, torch.nan)
    fused(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        out,
        batch.req_to_token,
        batch.scale,
        **kwargs,  # type: ignore[arg-type]
    )
    assert int(fused.queue) == 0
    return out


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference, the worst request's; nan never passes."""
    reference = reference.double()
    error = (out.double() - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return float(error.nan_to_num(torch.inf).max())
