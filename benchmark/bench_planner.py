"""Time and memory of `plan_batch`, on one core: `python benchmark/bench_planner.py`; and
`python benchmark/bench_planner.py --names`, what it takes to tell attention who shares what.

Every case is a batch of groups of equal prompts up to a random suffix, in random order. Seconds
are the best of three. Memory is the peak of input and planning together, in inputs, by
tracemalloc in a run of its own.

Names: 2,048 requests in a tree of nine levels, of which attention is told eight; all begin in one
step, or, once they run, 64 or one end and others take their rows. Milliseconds of such a step, the
median.
"""

import argparse
import array
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from results_file import ResultFile
from sglang_batchllm.attention.groups import GroupTable
from sglang_batchllm.planning import Prompts, TokenTable, plan_batch
from sglang_batchllm.policy.paths import SharedPaths
from sglang_batchllm.policy.pins import PinnedTree

VOCABULARY = 128_000
REPEATS = 3


def int64_rows(tokens: np.ndarray) -> Prompts:
    return list(tokens.astype(np.int64))


def int32_rows(tokens: np.ndarray) -> Prompts:
    return list(tokens)


def int64_table(tokens: np.ndarray) -> Prompts:
    return TokenTable(tokens.astype(np.int64).ravel(), np.arange(len(tokens) + 1) * tokens.shape[1])


def int64_matrix(tokens: np.ndarray) -> Prompts:
    return tokens.astype(np.int64)


def array_rows(tokens: np.ndarray) -> Prompts:
    return [array.array("q", row.astype(np.int64).tobytes()) for row in tokens]


def python_lists(tokens: np.ndarray) -> Prompts:
    return tokens.tolist()


@dataclass(frozen=True)
class Case:
    """`prompts` prompts of `length` tokens; the first `head` are common to all, the next up to
    `prefix` to each of `groups` groups, the rest random."""

    name: str
    form: Callable[[np.ndarray], Prompts]
    prompts: int
    length: int
    groups: int
    head: int = 0
    prefix: float = 0.9
    page_size: int = 1

    def tokens(self) -> np.ndarray:
        """int32[prompts, length]"""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, VOCABULARY, (self.prompts, self.length), np.int32)
        group = rng.permutation(np.arange(self.prompts) % self.groups)
        shared = int(self.prefix * self.length)
        tokens[:, :shared] = tokens[: self.groups, :shared][group]
        tokens[:, : self.head] = tokens[0, : self.head]
        return tokens


SCALES = [1_000, 3_000, 10_000, 30_000, 100_000]
CASES = [
    *(Case("scale", int64_rows, count, 500, count // 20) for count in SCALES),
    *(
        Case("input form", form, 20_000, 2_000, 1_000)
        for form in (int64_rows, int32_rows, int64_table, int64_matrix, array_rows, python_lists)
    ),
    Case("pages of 16", int64_rows, 20_000, 2_000, 1_000, page_size=16),
    Case("common head of 1,500", int64_rows, 20_000, 2_000, 1_000, head=1_500),
    Case("random prompts", int64_rows, 20_000, 2_000, 20_000, prefix=0),
]


def measure(case: Case) -> dict[str, str | int | float]:
    tokens = case.tokens()
    tracemalloc.start()
    prompts = case.form(tokens)
    input_bytes = tracemalloc.get_traced_memory()[0]
    if case.form is int32_rows:  # views of what exists already
        input_bytes += tokens.nbytes
    before = tracemalloc.get_traced_memory()[0]
    del tokens
    tracemalloc.reset_peak()
    plan_batch(prompts, case.page_size)
    extra_bytes = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()

    report = min(
        (plan_batch(prompts, case.page_size).report for _ in range(REPEATS)),
        key=lambda report: report.planning_seconds,
    )
    seconds = report.planning_seconds
    return {
        "case": case.name,
        "form": case.form.__name__,
        "prompts": case.prompts,
        "tokens": report.prompt_tokens,
        "groups": report.groups,
        "saving_ratio": round(report.saving_ratio, 3),
        "seconds": round(seconds, 4),
        "seconds_per_mtoken": round(seconds / report.prompt_tokens * 1e6, 5),
        "memory_ratio": round(1 + extra_bytes / input_bytes, 2),
    }


LEVELS, REQUESTS = 9, 2_048


def measure_names(file: ResultFile) -> None:
    """At level i of the tree, 2**i nodes of 256 tokens."""
    levels = [
        np.arange(REQUESTS).repeat(256).reshape(REQUESTS, 256) * 2**level // REQUESTS
        + level * 1_000
        for level in range(LEVELS)
    ]
    own = np.arange(REQUESTS)[:, None] + 100_000
    plan = plan_batch(np.concatenate([*levels, own], axis=1))
    store: Any = None  # nothing is pinned
    pins = PinnedTree(plan, store, lambda tokens, kept: None)
    paths = SharedPaths(plan, pins)
    assert len(paths.of(pins.home[0], LEVELS * 256)) == 8
    for entering in (REQUESTS, 64, 1):
        naming, entry = [], []
        for attempt in range(20):
            if entering == REQUESTS:
                paths = SharedPaths(plan, pins)
                table = GroupTable(REQUESTS, "cpu")
            rows = range(attempt * entering % REQUESTS, attempt * entering % REQUESTS + entering)
            began = time.perf_counter()
            found = [paths.of(pins.home[row], LEVELS * 256) for row in rows]
            named = time.perf_counter()
            table.assign(rows, found)
            naming.append(named - began)
            entry.append(time.perf_counter() - named)
        row = {
            "case": "names",
            "form": f"{entering} enter",
            "prompts": REQUESTS,
            "naming_ms": round(float(np.median(naming)) * 1e3, 3),
            "entry_ms": round(float(np.median(entry)) * 1e3, 3),
        }
        print(file.add(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of plan_batch")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("--names", action="store_true", help="what attention is told, instead")
    args = parser.parse_args()
    file = ResultFile(args.out, ("case", "form", "prompts"))
    if args.names:
        measure_names(file)
        return

    print("| case | form | prompts | tokens | groups | seconds | s per Mtoken | memory ratio |")
    print("|---|---|---|---|---|---|---|---|")
    plan_batch([[0, 0], [0, 0]])  # numpy imports some of its parts on first use
    for case in CASES:
        row = file.add(measure(case))
        print(
            f"| {row['case']} | {row['form']} | {row['prompts']:,} | {row['tokens']:,} "
            f"| {row['groups']:,} | {row['seconds']:.3f} | {row['seconds_per_mtoken']:.4f} "
            f"| {row['memory_ratio']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
