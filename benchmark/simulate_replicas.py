"""Simulate 8 to 1,000 replicas that share a planned batch, with stragglers and deaths.

    python benchmark/simulate_replicas.py --out benchmark/results/replicas.json
    python benchmark/simulate_replicas.py --output 1 --replicas 8 16 32 64 128 --troubles none \
        --out benchmark/results/replicas.json

Nothing runs on a GPU: units of a real plan and partition take what `planning.Costs` (fitted to one
H200) says for the outputs that they turn out to have, drawn at random and known to the plan only as
their mean. Seeded. See `replica_model.py` for what happens to replicas.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from replica_model import World, play, units_of
from results_file import ResultFile
from sglang_batchllm.planning import Costs, TokenTable, partition, plan_batch

VOCABULARY = 128_256
SYSTEM, DOCUMENT, QUESTION = 500, 400, 40
"""Tokens. Documents have 1 to a few thousand questions, by Zipf's law."""

TROUBLES = ("none", "slow", "deaths", "both")
SLOW_PART, SLOWNESS = 0.02, 1.5
"""So many replicas, one at least, are so slow; all others differ by 2%."""

REPLICA_HOURS = 100
"""Between two deaths; one at least in a run."""

RESTART_SECONDS = 60.0

AHEAD_PART = 1 / 40
"""Of the run, which a replica has in hand at most."""

PER_REQUEST = 68e-6
"""Seconds in which the front process of a server prepares, sends and answers a request, measured
(performance.md)."""

RUNNING = 256
"""Requests that a replica runs at a time: a unit ends when so many have come after its first."""


def prompts_of(count: int, seed: int) -> TokenTable:
    """Shuffled."""
    rng = np.random.default_rng(seed)
    documents = rng.integers(0, VOCABULARY, (count // 4, DOCUMENT), np.int32)
    chosen = rng.zipf(1.5, count) % 4096 * 7919 + rng.integers(0, 7919, count) // 400 * 131
    prompts = np.empty((count, SYSTEM + DOCUMENT + QUESTION), np.int32)
    prompts[:, :SYSTEM] = 7
    prompts[:, SYSTEM:-QUESTION] = documents[chosen % len(documents)]
    prompts[:, -QUESTION:] = rng.integers(0, VOCABULARY, (count, QUESTION), np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * prompts.shape[1]
    return TokenTable(prompts.ravel(), offsets)


def world_of(
    trouble: str, replicas: int, seconds: float, window: float, levels: bool, seed: int
) -> World:
    """seconds: that the run takes, about."""
    rng = np.random.default_rng([seed, replicas])
    slowness = np.exp(rng.normal(0, 0.02, replicas))
    deaths: list[tuple[float, int]] = []
    if trouble in ("slow", "both"):
        slow = rng.choice(replicas, max(1, round(SLOW_PART * replicas)), replace=False)
        slowness[slow] *= SLOWNESS
    if trouble in ("deaths", "both"):
        count = max(1, round(replicas * seconds / 3600 / REPLICA_HOURS))
        deaths = [
            (float(moment), int(number))
            for moment, number in zip(
                rng.uniform(0, seconds, count), rng.integers(0, replicas, count), strict=True
            )
        ]
    return World(
        slowness, deaths, RESTART_SECONDS, window, seconds * AHEAD_PART, levels, PER_REQUEST
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", nargs="+", type=int, default=[8, 64, 256, 1000])
    parser.add_argument("--requests", type=int, default=250, help="planned for each replica")
    parser.add_argument("--times", type=int, default=40, help="that the plan is played over")
    parser.add_argument("--output", type=int, default=2000, help="mean tokens of an answer")
    parser.add_argument("--troubles", nargs="+", choices=TROUBLES, default=TROUBLES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("output", "replicas", "trouble", "levels"))
    costs = Costs()
    for replicas in args.replicas:
        count = replicas * args.requests
        table = prompts_of(count, args.seed)
        expected = np.full(count, args.output)
        started = time.process_time()
        plan = plan_batch(table, 1, expected)
        del table
        partition(plan, replicas, expected, costs)
        planning = time.process_time() - started
        rng = np.random.default_rng(args.seed)
        decoded = [rng.geometric(1 / args.output, count) for _ in range(args.times)]
        units = units_of(plan, replicas, expected, decoded, costs)
        seconds = float(units.seconds.sum()) / replicas
        window = seconds / (count * args.times / replicas) * RUNNING
        for trouble in args.troubles:
            for levels in (False, True):
                world = world_of(trouble, replicas, seconds, window, levels, args.seed)
                outcome = play(units, world)
                finished = count * args.times / outcome.seconds
                row = {
                    "output": args.output,
                    "replicas": replicas,
                    "trouble": trouble,
                    "levels": levels,
                    "requests": count * args.times,
                    "seconds": outcome.seconds,
                    "best_seconds": outcome.best,
                    "efficiency": outcome.efficiency,
                    "deaths": len(world.deaths),
                    "lost_replica_seconds": outcome.lost,
                    "distinct_tokens": plan.report.distinct_tokens * args.times,
                    "repeated_by_partition": units.repeated_tokens,
                    "repeated_by_troubles": outcome.repeated_tokens,
                    "requests_per_second": finished,
                    "planned_per_second": count / planning,
                    "replicas_that_planning_feeds": count / planning / finished * replicas,
                    "hand_outs_per_second": outcome.handed_out / outcome.seconds,
                    "coordinator_at_work": outcome.coordinating / outcome.seconds,
                    "window_seconds": window,
                }
                print(json.dumps(file.add(row)), flush=True)


if __name__ == "__main__":
    main()
