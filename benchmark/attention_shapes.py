"""The batches of `bench_attention.py`, and one step's tensors of each on the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from sglang_batchllm.attention.groups import LEVELS, GroupTable

HEADS, KV_HEADS, DIM = 32, 8, 128
BYTES_PER_MS = 4.3e9
Path = tuple[list[tuple[Hashable, int]], int]
"""The nodes that a request shares, outermost first, as name and tokens; and its own tokens."""
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

TREES: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "chain of 3": ((1, 16, 64), (1024, 256, 32), 1.9),
    "chain of 4": ((1, 4, 16, 512), (1024, 256, 128, 32), 5.0),
    "chain of 6": ((1, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16), 3.1),
    "binary": ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (256, 128, 64, *[16] * 6), 3.6),
    "by fours": ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256), 1.6),
    "one prefix, 1024": ((1, 1024), (2048, 32), 6.9),
    "one prefix, 256": ((1, 256), (256, 32), 2.4),
    "system, documents, questions": ((1, 32, 512), (4000, 500, 250), 6.3),
    "64 documents": ((1, 64, 512), (2000, 2000, 250), 3.6),
    "tools, documents": ((1, 8, 128, 512), (1000, 3000, 500, 250), 4.6),
    "32 groups": ((32, 512), (2000, 250), 2.8),
    "8 groups": ((8, 512), (2000, 250), 3.8),
    "16 groups of 8000": ((16, 512), (8000, 300), 6.4),
}
"""Nodes per level, tokens per node, and the ratio to fa3 that is wanted."""


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
    table: GroupTable
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
    paths: list[Path] = []
    members: list[list[int]] = []
    for number, (prefix, suffixes) in enumerate(groups):
        members.append(list(range(len(paths), len(paths) + len(suffixes))))
        shared = [(number, prefix)] if prefix and len(suffixes) > 1 else []
        paths += [(shared, suffix + (0 if shared else prefix)) for suffix in suffixes]
    inputs = make_tree_inputs(paths, seed)
    return replace(inputs, members=members, prefixes=[prefix for prefix, _ in groups])


def make_tree_inputs(paths: list[Path], seed: int = 0, levels: int = LEVELS) -> Inputs:
    """levels: 1 to read one shared node alone, that which saves most where all are alike."""
    gen = torch.Generator().manual_seed(seed)
    batch = len(paths)
    tokens_of = {node: tokens for nodes, _ in paths for node, tokens in nodes}
    sizes = list(tokens_of.values()) + [own for _, own in paths]
    unique = sum(sizes)
    context = max(sum(n for _, n in nodes) + own for nodes, own in paths)
    stretches = (torch.randperm(unique, generator=gen) + 1).int().split(sizes)
    node_slots = dict(zip(tokens_of, stretches, strict=False))
    numbers = {node: number for number, node in enumerate(tokens_of, start=1)}
    count = Counter(node for nodes, _ in paths for node, _ in nodes)
    req_to_token = torch.zeros((batch + 1, context), dtype=torch.int32)
    seq_lens = torch.zeros(batch, dtype=torch.int64)
    shared: list[list[tuple[int, int]]] = []
    for i, (nodes, own) in enumerate(paths):
        path = torch.cat([*(node_slots[node] for node, _ in nodes), stretches[len(tokens_of) + i]])
        req_to_token[i + 1, : len(path)] = path
        seq_lens[i] = len(path)
        ends = accumulate(tokens for _, tokens in nodes)
        marks = [(numbers[node], end) for (node, _), end in zip(nodes, ends, strict=True)]
        if levels == 1 and nodes:
            saves = [
                (1 - 1 / count[node]) * end
                for (node, _), (_, end) in zip(nodes, marks, strict=True)
            ]
            marks = [marks[saves.index(max(saves))]]
        shared.append(marks)
        assert sum(n for _, n in nodes) + own == len(path)
    table = GroupTable(batch + 1, "cuda")
    rows = torch.arange(batch) + 1
    table.assign(rows.tolist(), shared)
    shape = (unique + 64, KV_HEADS, DIM)
    copies = max(2, -(-(1 << 30) // (unique * KV_HEADS * DIM * 4)))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    return Inputs(
        random(batch, HEADS, DIM),
        [(random(*shape), random(*shape)) for _ in range(min(copies, 8))],
        req_to_token.cuda(),
        rows.cuda(),
        seq_lens.cuda(),
        table,
        [],
        [],
        unique,
    )


def tree(nodes: Sequence[int], tokens: Sequence[int]) -> list[Path]:
    """Requests at the leaves of a tree with so many nodes a level, of so many tokens each. What a
    leaf has is its request's own."""
    requests = nodes[-1]
    return [
        (
            [
                ((level, i * count // requests), length)
                for level, (count, length) in enumerate(zip(nodes, tokens, strict=True))
                if count < requests
            ],
            tokens[-1],
        )
        for i in range(requests)
    ]


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
