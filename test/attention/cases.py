"""Random ragged decode batches for the attention tests."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sglang_batchllm.attention.fused import FusedDecode, KernelConfig, KernelConfigs
from sglang_batchllm.attention.groups import GroupTable
from sglang_batchllm.attention.reference import reference_decode
from sglang_batchllm.attention.worklist import WorkList, WorkListConfig

Path = tuple[list[tuple[Hashable, int]], int]

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
    levels: int
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


def make_batch(groups: list[tuple[int, list[int]]], *shape: Any, **options: Any) -> Batch:
    """groups: (prefix tokens, suffix tokens of each member); a group of prefix 0 is no group.
    shape, options: as `make_tree_batch` takes them."""
    paths: list[Path] = []
    for number, (prefix, suffixes) in enumerate(groups):
        shared = [(number, prefix)] if prefix else []
        paths += [(shared, suffix) for suffix in suffixes]
    return make_tree_batch(paths, *shape, **options)


def make_tree_batch(
    paths: list[Path],
    num_kv_heads: int = 2,
    ratio: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    page_size: int = 1,
    padding: int = 0,
    rope_dim: int = 0,
) -> Batch:
    """paths: of each request, the nodes that it shares, outermost first, as name and tokens, and
    its own tokens; ``padding`` rows of one token follow.

    Requests are in random order, and slots too, in whole pages. With rope_dim, keys are values and
    so many elements more.
    """
    gen = torch.Generator().manual_seed(seed)
    members = len(paths)
    num_rows = members + 3
    context = max((sum(n for _, n in nodes) + own for nodes, own in paths), default=1) + 2
    tokens_of = {node: tokens for nodes, _ in paths for node, tokens in nodes}
    sizes = list(tokens_of.values()) + [own for _, own in paths]
    pages = [-(-tokens // page_size) for tokens in sizes]
    num_pages = sum(pages)
    order = (torch.randperm(num_pages, generator=gen) + 1)[:, None] * page_size
    slots = (order + torch.arange(page_size)).int().split(pages)
    stretches = [part.flatten()[:tokens] for part, tokens in zip(slots, sizes, strict=True)]
    node_slots = dict(zip(tokens_of, stretches, strict=False))

    req_to_token = torch.full((num_rows, context), 2**30, dtype=torch.int32)
    req_to_token[0, :] = 0
    table = GroupTable(num_rows, "cpu")
    rows = torch.randperm(num_rows - 1, generator=gen)[:members] + 1
    seq_lens = torch.zeros(members, dtype=torch.int64)
    numbers = {node: number for number, node in enumerate(tokens_of, start=1)}
    shared_paths: list[list[tuple[int, int]]] = []
    for i, ((nodes, own), mine) in enumerate(zip(paths, stretches[len(tokens_of) :], strict=True)):
        ends = list(itertools.accumulate(tokens for _, tokens in nodes))
        path = [*(node_slots[node] for node, _ in nodes), mine]
        req_to_token[rows[i], : sum(map(len, path))] = torch.cat(path)
        seq_lens[i] = sum(tokens for _, tokens in nodes) + own
        shared_paths.append(
            [(numbers[node], end) for (node, _), end in zip(nodes, ends, strict=True)]
        )
    table.assign(rows.tolist(), shared_paths)
    used = stretches
    shuffled = torch.randperm(members, generator=gen)
    rows = torch.cat([rows[shuffled], torch.zeros(padding, dtype=rows.dtype)])
    seq_lens = torch.cat([seq_lens[shuffled], torch.ones(padding, dtype=seq_lens.dtype)])

    num_slots = (num_pages + 2) * page_size
    index = torch.cat(used).long() if used else torch.zeros(0, dtype=torch.long)
    if padding:
        index = torch.cat([index, torch.zeros(1, dtype=torch.long)])
    caches = []
    for _ in range(2):
        cache = torch.full((num_slots, num_kv_heads, head_dim + rope_dim), torch.nan)
        cache[index] = torch.randn(len(index), *cache.shape[1:], generator=gen)
        caches.append(cache.to(kv_dtype or dtype).to(device))
    if rope_dim:
        caches[1] = caches[0][..., :head_dim]
    q = torch.randn(len(rows), num_kv_heads * ratio, head_dim + rope_dim, generator=gen).to(dtype)
    return Batch(
        q.to(device),
        caches[0],
        caches[1],
        req_to_token.to(device),
        rows.to(device),
        seq_lens.to(device),
        table.group_id.to(device),
        table.prefix_len.to(device),
        table.levels,
        int(index.numel()),
    )


def make_fused(
    batch: Batch,
    config: KernelConfig | KernelConfigs = TINY_CONFIG,
    num_programs: int = 3,
    many_programs: int | None = None,
    min_saved_tokens: int = 1,
    max_batch: int | None = None,
    part_tokens: int = 0,
    wide_tokens: int = 12,
    window: int | None = None,
) -> FusedDecode:
    num_heads, key_dim = batch.q.shape[1:]
    num_kv_heads, head_dim = batch.v_cache.shape[1:]
    lanes = triton.next_power_of_2(num_heads // num_kv_heads)
    configs = config if isinstance(config, KernelConfigs) else KernelConfigs(config, config)
    config = configs.few
    work = WorkList(
        WorkListConfig(
            num_kv_heads,
            max(config.block_m_small // lanes, 1),
            max(config.block_m_large // lanes, 1),
            num_programs,
            many_programs or num_programs,
            min_saved_tokens,
            part_tokens,
            wide_tokens,
            window,
        ),
        max_batch or batch.q.shape[0],
        batch.req_to_token.shape[0],
        batch.k_cache.shape[0],
        batch.q.device,
    )
    return FusedDecode(
        configs,
        work,
        num_heads,
        num_kv_heads,
        head_dim,
        batch.q.dtype,
        batch.q.device,
        rope_dim=key_dim - head_dim,
    )


def run(fused: FusedDecode, batch: Batch, **kwargs: object) -> torch.Tensor:
    """Build the work list and run the kernel once, over poisoned output and workspace."""
    fused.parts.fill_(torch.nan)
    fused.part_lse.fill_(torch.nan)
    fused.work.build(
        batch.rows,
        batch.seq_lens,
        batch.group_id,
        batch.prefix_len,
        batch.req_to_token,
        batch.levels,
    )
    out = batch.q.new_full((*batch.q.shape[:2], fused.head_dim), torch.nan)
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
