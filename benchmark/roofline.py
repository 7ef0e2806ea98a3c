"""The physical floor of a batch: the least time its arithmetic and its bytes can take.

    python benchmark/roofline.py                the cases, with Llama-3.1-8B's shape on an H200
    python benchmark/roofline.py --config FILE  of another model: its config.json

The ideal schedule meant here computes every distinct prompt token once, in steps as large as it
likes, and then decodes with as many requests at once as the KV pool holds, the longest first and
the members of a group in step. Its times are added, not overlapped: prefill and decode arithmetic
at the chip's matrix rate (the output layer only for tokens that are sampled), a decode step at
least as long as reading the weights, and the KV of the running requests once per decode step, a
shared prefix once for all.
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batches import CASES, Batch, TraceSample
from sglang_batchllm.planning import BatchPlan, plan_batch

DEFAULT_KV_TOKENS = 910_000
"""The KV pool of an 8B model on an H200, SGLang's default share of the memory."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with gated MLPs, bf16.

    experts, active: of a mixture, how many there are and how many a token passes through, each of
    `intermediate`. full_layers: those that attend to the whole context; what others read of a
    window or a state is left out, so that the floor is lower than it would be. latent: elements of
    KV per token and layer where K and V are not kept by heads (MLA, in its absorbed form).
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 1
    active: int = 1
    full_layers: int | None = None
    latent: int | None = None

    @staticmethod
    def of(config: dict[str, Any]) -> ModelShape:
        """From a Hugging Face config.json. The few weights of routers, of dense layers before a
        mixture's and of linear attention's gates are taken as those of the other layers."""
        config = config.get("text_config", config)
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        layers = config["num_hidden_layers"]
        experts = next((config[name] for name in _EXPERTS if name in config), 1)
        shared = config.get("n_shared_experts", 0)
        rank = config.get("kv_lora_rank")
        return ModelShape(
            layers,
            hidden,
            config.get("moe_intermediate_size") or config["intermediate_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config.get("v_head_dim") or hidden // heads,
            config["vocab_size"],
            experts + shared,
            config.get("num_experts_per_tok", 1) + shared,
            _full_layers(config, layers),
            rank and rank + config["qk_rope_head_dim"],
        )

    @property
    def attention_weights(self) -> int:
        return self.layers * self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Of one expert in each layer, or of the MLPs."""
        return self.layers * 3 * self.hidden * self.intermediate

    @property
    def layer_weights(self) -> int:
        """Matrix weights of all layers that a token passes through."""
        return self.attention_weights + self.active * self.expert_weights

    @property
    def output_weights(self) -> int:
        return self.hidden * self.vocab

    def read_weights(self, tokens: np.ndarray) -> np.ndarray:
        """Weights that a step of so many tokens reads, where each takes experts at random."""
        unread = (1 - self.active / self.experts) ** tokens
        experts = self.experts * (1 - unread) * self.expert_weights
        return self.attention_weights + self.output_weights + experts

    @property
    def kv_bytes(self) -> int:
        """Of one token, in the layers that keep all."""
        elements = self.latent or 2 * self.kv_heads * self.head_dim
        return self._full * elements * 2

    @property
    def pair_flops(self) -> int:
        """Of one (query, key) pair of tokens: two products per head, over the layers that attend
        to the whole context."""
        return self._full * 4 * self.heads * self.head_dim

    @property
    def _full(self) -> int:
        return self.layers if self.full_layers is None else self.full_layers


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _full_layers(config: dict[str, Any], layers: int) -> int | None:
    types = config.get("layer_types")
    if types is not None:
        return sum(kind == "full_attention" for kind in types)
    every = config.get("full_attention_interval") or config.get("sliding_window_pattern")
    return every and layers // every


LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)


@dataclass(frozen=True)
class Chip:
    """Rates measured on one H200: bf16 matrix products, and copies in its memory."""

    flops: float = 790e12
    bytes_per_second: float = 4.3e12


@dataclass(frozen=True)
class Floor:
    """Seconds: matrix work of prefill, its attention, decode's matrix work or weights, decode's
    KV reads. steps: decode steps. rows: requests that decode at once at most."""

    prefill: float
    attention: float
    decode: float
    kv: float
    steps: int
    rows: int

    @property
    def seconds(self) -> float:
        return self.prefill + self.attention + self.decode + self.kv


def floor(batch: Batch, shape: ModelShape = LLAMA_8B, chip: Chip = Chip()) -> Floor:
    """The floor of `batch`, on random token ids as its prompts are."""
    plan = plan_batch(batch.prompts(shape.vocab))
    # The first output token comes with the prefill.
    decoded = np.array(batch.outputs()) - 1
    lens, fresh = plan.prompt_lens, plan.to_compute
    pairs = float((fresh * (2 * lens - fresh) / 2).sum())
    sampled = len(lens) * shape.output_weights
    prefill = 2 * (float(fresh.sum()) * shape.layer_weights + sampled) / chip.flops

    # A request holds what it computed of its prompt, and half of its output on average.
    held = float((decoded * (fresh + decoded / 2)).sum()) / max(int(decoded.sum()), 1)
    pool = batch.kv_tokens or DEFAULT_KV_TOKENS
    rows = min(len(lens), max(int(pool / max(held, 1.0)), 1))
    running = _rows_by_step(decoded, rows)
    row_seconds = 2 * (shape.layer_weights + shape.output_weights) / chip.flops
    weight_seconds = 2 * shape.read_weights(running) / chip.bytes_per_second
    decode = float(np.maximum(running * row_seconds, weight_seconds).sum())

    read = float((decoded * (decoded + 1) / 2).sum()) + _prompt_reads(plan, decoded, rows)
    return Floor(
        prefill=prefill,
        attention=pairs * shape.pair_flops / chip.flops,
        decode=decode,
        kv=read * shape.kv_bytes / chip.bytes_per_second,
        steps=len(running),
        rows=rows,
    )


def _rows_by_step(decoded: np.ndarray, rows: int) -> np.ndarray:
    """Requests that decode in each step, int64[steps], when `rows` run at once, longest first."""
    ends = [0] * rows
    for length in sorted(decoded.tolist(), reverse=True):
        heapq.heapreplace(ends, ends[0] + length)
    return np.cumsum(np.bincount(ends)[::-1])[::-1][1:]


def _prompt_reads(plan: BatchPlan, decoded: np.ndarray, rows: int) -> float:
    """Prompt tokens read over all decode steps: each tree node as often as the longest request
    below it needs, or as `rows` at a time take for all of them."""
    tree = plan.tree
    longest = np.zeros(tree.num_nodes, np.int64)
    np.maximum.at(longest, tree.request_node, decoded)
    total = np.zeros(tree.num_nodes, np.int64)
    np.add.at(total, tree.request_node, decoded)
    for node in range(tree.num_nodes - 1, 0, -1):
        parent = tree.parent[node]
        longest[parent] = max(longest[parent], longest[node])
        total[parent] += total[node]
    return float((tree.edge_len * np.maximum(longest, total / rows)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="config.json of a model")
    parser.add_argument("--trace", type=Path, help="a sample of this trace too")
    args = parser.parse_args()
    shape = ModelShape.of(json.loads(args.config.read_text())) if args.config else LLAMA_8B
    batches: list[Batch] = [*CASES.values()]
    if args.trace:
        batches.append(TraceSample.of(args.trace))
    columns = ["case", "prefill", "attention", "decode", "kv", "seconds", "rows", "steps", "req/s"]
    print("".join(f"{name:>10}" for name in columns))
    for batch in batches:
        least = floor(batch, shape)
        parts = (least.prefill, least.attention, least.decode, least.kv, least.seconds)
        print(
            f"{batch.name:>10}"
            + "".join(f"{part:>10.2f}" for part in parts)
            + f"{least.rows:>10}{least.steps:>10}{batch.requests / least.seconds:>10.1f}"
        )


if __name__ == "__main__":
    main()
