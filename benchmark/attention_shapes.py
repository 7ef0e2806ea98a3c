"""The batches of `bench_attention.py`, and one step's tensors of each on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEADS, KV_HEADS, DIM = 32, 8, 128
BYTES_PER_MS = 4.3e9
Groups = list[tuple[int, list[int]]]
"""(prefix tokens, suffix tokens of each member); prefix 0 is no group."""

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "32x16, 2000, 250": (32, 16, 2000, 250),
    "8x64, 2000, 250": (8, 64, 2000, 250),
    "128x4, 2000, 250": (128, 4, 2000, 250),
    "64x16, 1000, 200": (64, 16, 1000, 200),
    "16x32, 8000, 300": (16, 32, 8000, 300),
    "512 singletons of 2250": (512, 1, 0, 2250),
}


def uniform(groups: int, members: int, prefix: int, suffix: int) -> Groups:
    return [(prefix, [suffix] * members) for _ in range(groups)]


@dataclass
class Inputs:
    """One step's batch on the GPU, members of a group next to each other, slots random.

    That order, the runtime's, is the best one for flat kernels: neighbours share the L2.
    """

    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    req_to_token: torch.Tensor
    rows: torch.Tensor
    seq_lens: torch.Tensor
    group_id: torch.Tensor
    prefix_len: torch.Tensor
    members: list[list[int]]
    prefixes: list[int]
    unique_tokens: int

    @property
    def floor_ms(self) -> float:
        return self.unique_tokens * KV_HEADS * DIM * 4 / BYTES_PER_MS

    @property
    def scale(self) -> float:
        return DIM**-0.5


def make_inputs(groups: Groups, seed: int = 0) -> Inputs:
    gen = torch.Generator().manual_seed(seed)
    batch = sum(len(suffixes) for _, suffixes in groups)
    unique = sum(prefix + sum(suffixes) for prefix, suffixes in groups)
    context = max(prefix + max(suffixes) for prefix, suffixes in groups)
    slots = (torch.randperm(unique, generator=gen) + 1).int()
    req_to_token = torch.zeros((batch + 1, context), dtype=torch.int32)
    group_id = torch.zeros(batch + 1, dtype=torch.int32)
    prefix_len = torch.zeros(batch + 1, dtype=torch.int32)
    seq_lens = torch.zeros(batch + 1, dtype=torch.int64)
    members: list[list[int]] = []
    row, at = 1, 0
    for number, (prefix, suffixes) in enumerate(groups, start=1):
        shared = slots[at : at + prefix]
        at += prefix
        members.append(list(range(row, row + len(suffixes))))
        for suffix in suffixes:
            req_to_token[row, :prefix] = shared
            req_to_token[row, prefix : prefix + suffix] = slots[at : at + suffix]
            at += suffix
            seq_lens[row] = prefix + suffix
            if prefix and len(suffixes) > 1:
                group_id[row], prefix_len[row] = number, prefix
            row += 1
    rows = torch.arange(batch) + 1
    position = torch.zeros(batch + 1, dtype=torch.long)
    position[rows] = torch.arange(batch)
    shape = (unique + 64, KV_HEADS, DIM)
    copies = max(2, -(-(1 << 30) // (unique * KV_HEADS * DIM * 4)))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    return Inputs(
        random(batch, HEADS, DIM),
        [(random(*shape), random(*shape)) for _ in range(min(copies, 8))],
        req_to_token.cuda(),
        rows.cuda(),
        seq_lens[rows].cuda(),
        group_id.cuda(),
        prefix_len.cuda(),
        [position[m].tolist() for m in members],
        [prefix for prefix, _ in groups],
        unique,
    )


def ragged_groups(seed: int = 0) -> Groups:
    """A batch as decoding leaves it: few large groups, many small ones, suffixes of any length."""
    gen = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(low * (high / low) ** float(torch.rand(1, generator=gen)))

    groups = [
        (between(200, 8000), [between(50, 500) for _ in range(between(1, 65))]) for _ in range(48)
    ]
    return groups + [(0, [between(100, 2000)]) for _ in range(32)]


def sweeps() -> dict[str, list[tuple[int, Groups]]]:
    return {
        "sharing degree": [
            (m, uniform(512 // m, m, 2000, 250)) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        ],
        "prefix tokens": [
            (p, uniform(16, 16, p, 250)) for p in (0, 250, 1000, 2000, 4000, 8000, 16000, 32000)
        ],
        "suffix tokens": [(s, uniform(32, 16, 2000, s)) for s in (1, 16, 64, 250, 500, 1000, 2000)],
    }
