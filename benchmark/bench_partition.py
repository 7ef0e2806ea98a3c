"""Requests spread over several engines: by the prefix tree, and as others do.

    python benchmark/bench_partition.py --out FILE
    python benchmark/bench_partition.py --loads million --shards 1000 --ways tree --out FILE
    python benchmark/bench_partition.py --loads trace --trace TRACE --out FILE

Nothing runs: what each way would compute, how even the shards are, and how long the longest would
take, by `planning.Costs`. "rows" deals the requests out in turn; "hash" goes by the first 512
tokens, as gateways do; "sorted" cuts the sorted prompts into ranges of equally many.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batches import CASES, TraceSample
from results_file import ResultFile
from sglang_batchllm.planning import BatchPlan, Partition, evaluate, partition, plan_batch

VOCABULARY = 128_256
HASHED_TOKENS = 512


@dataclass(frozen=True)
class Load:
    """prompts: token ids, shuffled. outputs: tokens that each decodes."""

    prompts: Any  # lists, or a table of equally long ones
    outputs: np.ndarray


def load_of(name: str, trace: Path | None) -> Load:
    """trace: a Mooncake trace, for the load of that name (see `bench_trace.py`)."""
    rng = random.Random(name)

    def tokens(count: int) -> list[int]:
        return rng.choices(range(VOCABULARY), k=count)

    if name == "million":  # documents of Zipf's popularity, and questions under them
        random_ids = np.random.default_rng(0)
        documents = random_ids.integers(0, VOCABULARY, (60_000, 60), np.int32)
        documents[:, :20] = 7
        chosen = documents[random_ids.zipf(1.3, 1_000_000) % len(documents)]
        questions = random_ids.integers(0, VOCABULARY, (len(chosen), 20), np.int32)
        return Load(np.hstack([chosen, questions]), random_ids.geometric(1 / 50, len(chosen)))
    if name == "trace":
        if trace is None:
            raise SystemExit("error: the load trace needs --trace FILE")
        sample = TraceSample.of(trace)
        return Load(sample.prompts(VOCABULARY), np.array(sample.outputs()))
    if name == "tree":  # a system prompt, 32 documents under it, questions under these
        system = tokens(4000)
        documents = [tokens(500) for _ in range(32)]
        prompts = [[*system, *documents[i % 32], *tokens(250)] for i in range(2048)]
    elif name == "skewed":  # one document has half of all requests
        documents = [tokens(2000) for _ in range(101)]
        prompts = [
            [*documents[0 if i % 2 else 1 + i // 2 % 100], *tokens(200)] for i in range(4000)
        ]
    else:
        case = CASES[name]
        return Load(case.prompts(VOCABULARY), np.array(case.outputs()))
    rng.shuffle(prompts)
    return Load(prompts, np.full(len(prompts), 100))


Way = Callable[[Load, BatchPlan, int], Partition]


def _by_tree(load: Load, plan: BatchPlan, shards: int) -> Partition:
    return partition(plan, shards, load.outputs)


def _by_rows(load: Load, plan: BatchPlan, shards: int) -> Partition:
    return evaluate(plan, np.arange(len(load.prompts)) % shards, shards, load.outputs)


def _by_hash(load: Load, plan: BatchPlan, shards: int) -> Partition:
    heads = (np.array(prompt[:HASHED_TOKENS], np.int32).tobytes() for prompt in load.prompts)
    shard_of = np.array([zlib.crc32(head) % shards for head in heads])
    return evaluate(plan, shard_of, shards, load.outputs)


def _by_sorting(load: Load, plan: BatchPlan, shards: int) -> Partition:
    order = sorted(range(len(load.prompts)), key=load.prompts.__getitem__)
    shard_of = np.empty(len(order), np.int64)
    shard_of[order] = np.arange(len(order)) * shards // len(order)
    return evaluate(plan, shard_of, shards, load.outputs)


WAYS: dict[str, Way] = {
    "tree": _by_tree,
    "rows": _by_rows,
    "hash": _by_hash,
    "sorted": _by_sorting,
}
LOADS = (
    "million",
    "M1",
    "M2",
    "M3",
    "M4",
    "M5",
    "M6",
    "mixed",
    "classify",
    "tree",
    "skewed",
    "trace",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS[1:-1]))
    parser.add_argument("--trace", type=Path, help="a Mooncake trace")
    parser.add_argument("--shards", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("load", "shards", "way"))
    for name in args.loads:
        load = load_of(name, args.trace)
        plan = plan_batch(load.prompts, 1, load.outputs)
        for shards in args.shards:
            for way in args.ways:
                started = time.perf_counter()
                found = WAYS[way](load, plan, shards)
                row = {
                    "load": name,
                    "shards": shards,
                    "way": way,
                    "computed_tokens": int(found.computed_tokens.sum()),
                    "distinct_tokens": int(found.computed_tokens.sum()) - found.repeated_tokens,
                    "balance": found.balance,
                    "seconds": float(found.seconds.max()),
                    "lower_bound": found.lower_bound,
                    "planning_seconds": plan.report.planning_seconds,
                    "took_seconds": time.perf_counter() - started,
                }
                print(json.dumps(file.add(row)))


if __name__ == "__main__":
    main()
