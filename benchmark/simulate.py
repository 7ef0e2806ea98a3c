"""Plan a batch, play its steps without a GPU, and say what they would cost.

    python benchmark/simulate.py --steps FILE... --out benchmark/results/simulation.json
    python benchmark/simulate.py --model benchmark/results/simulation.json --trace TRACE

FILE: what `bench_offline.py --steps` wrote. The first call fits the cost model to these files and
predicts the total of each of their runs (of side "fused"; also with a model fitted to the other
cases only). Both compare scheduling policies on every case; the second takes the cost model of an
earlier call.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batches import CASES, Batch, TraceSample
from cost_model import CostModel, Work, fit, graph_limit_of, steps_of
from engine_model import Policy, list_model
from roofline import DEFAULT_KV_TOKENS, LLAMA_8B, floor
from steps import Step

GRAPH_LIMITS = (256, 1024)
POLICIES = {
    f"{'mixed' if mixed else 'prefill'} {chunk}": Policy(chunk, "all" if mixed else "none")
    for mixed in (False, True)
    for chunk in (8192, 4096, 2048, 1024)
}
PARTS = ("prefill", "attention", "decode", "kv")


def simulate(batch: Batch, policy: Policy) -> list[Work]:
    """The steps that run `batch` to the end."""
    prompts = batch.prompts(LLAMA_8B.vocab)
    capacity = batch.kv_tokens or DEFAULT_KV_TOKENS
    return list_model(prompts, batch.outputs(), capacity, policy, batch.limit)[0].run()


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predicted against measured, one row per run; the policy and graphs are those of the run.

    equal_steps: share of the steps that take the same tokens at the same place as those played.
    predicted_by_others: with a cost model that never saw a run of the case.
    """
    model = fit(runs)
    played: dict[tuple[str, Policy], list[Work]] = {}
    rows = []
    for run in runs:
        steps, batch = steps_of(run), CASES[run["case"]]
        mixed = any(step.prefill_tokens and step.decode_requests for step in steps)
        policy = Policy(run.get("chunk", Policy.chunk), "all" if mixed else "none")
        if (batch.name, policy) not in played:
            played[batch.name, policy] = simulate(batch, policy)
        works, least = played[batch.name, policy], floor(batch)
        others = [other for other in runs if other["case"] != batch.name]
        graph_limit, tokens = graph_limit_of(steps), run["prompt_tokens"]
        row = {
            "case": batch.name,
            "mixed": mixed,
            "chunk": policy.chunk,
            "graph_limit": graph_limit,
            "steps": len(steps),
            "simulated_steps": len(works),
            "equal_steps": sum(map(_equal, steps, works)) / max(len(steps), len(works)),
            "seconds": run["seconds"],
            "predicted": model.seconds(works, graph_limit, tokens),
            "floor": asdict(least) | {"seconds": least.seconds},
            "parts": model.parts(works),
        }
        if others:
            row["predicted_by_others"] = fit(others).seconds(works, graph_limit, tokens)
        rows.append(row)
    return rows


def _equal(step: Step, work: Work) -> bool:
    """Whether the step recorded and the step played took the same tokens."""
    return (step.prefill_tokens, step.decode_requests) == (
        work.prefill_tokens,
        work.decode_requests,
    )


def print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    columns = (
        *("case", "mixed", "chunk", "graphs", "steps", "played", "equal"),
        *("seconds", "predicted", "error", "others", "floor", "reached"),
    )
    print("".join(f"{word:>10}" for word in columns))
    for row in rows:
        measured = row["seconds"]
        error = row["predicted"] / measured - 1
        others = row.get("predicted_by_others", float("nan")) / measured - 1
        print(
            f"{row['case']:>10}{row['mixed']!s:>10}{row['chunk']:>10}"
            f"{row['graph_limit']!s:>10}{row['steps']:>10}"
            f"{row['simulated_steps']:>10}{row['equal_steps']:>10.1%}"
            f"{measured:>10.2f}{row['predicted']:>10.2f}{error:>10.1%}{others:>10.1%}"
            f"{row['floor']['seconds']:>10.2f}{row['floor']['seconds'] / measured:>10.1%}"
        )
    print("\nwhere the time goes, modelled seconds / floor")
    print("".join(f"{word:>16}" for word in ["case", *PARTS, "unexplained"]))
    for row in rows:
        shares = (f"{row['parts'][part]:.2f} / {row['floor'][part]:.2f}" for part in PARTS)
        idle = row["seconds"] - sum(row["parts"].values())
        print("".join(f"{cell:>16}" for cell in [row["case"], *shares, f"{idle:.2f}"]))


def try_policies(batches: Sequence[Batch], model: CostModel) -> list[dict[str, Any]]:
    """Seconds of each batch under each policy and graph limit; prints the table."""
    rows: list[dict[str, Any]] = []
    print("\npredicted seconds, CUDA graphs up to " + " / ".join(map(str, GRAPH_LIMITS)))
    print(f"{'':>16}" + "".join(f"{batch.name:>16}" for batch in batches))
    for name, policy in POLICIES.items():
        cells = []
        for batch in batches:
            works = simulate(batch, policy)
            tokens = sum(map(len, batch.prompts(LLAMA_8B.vocab)))
            seconds = [model.seconds(works, limit, tokens) for limit in GRAPH_LIMITS]
            cells.append(" / ".join(f"{value:.2f}" for value in seconds))
            rows.append({"case": batch.name, "policy": name, "seconds": seconds})
        print(f"{name:>16}" + "".join(f"{cell:>16}" for cell in cells))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--steps", nargs="+", type=Path, help="recorded steps to fit to")
    source.add_argument("--model", type=Path, help="a file that --out wrote")
    parser.add_argument("--trace", type=Path, help="try the policies on a sample of it too")
    parser.add_argument("--out", type=Path, help="write everything to this file")
    args = parser.parse_args()
    result: dict[str, Any] = {"graph_limits": GRAPH_LIMITS}
    if args.steps:
        files = (json.loads(path.read_text()) for path in args.steps)
        runs = [run for file in files for run in file if run["side"] == "fused"]
        model = fit(runs)
        result["comparison"] = compare(runs)
        print_comparison(result["comparison"])
    else:
        model = CostModel(**json.loads(args.model.read_text())["cost_model"])
    result["cost_model"] = asdict(model)
    print(f"\n{model}")
    batches: list[Batch] = [*CASES.values()]
    if args.trace:
        batches.append(TraceSample.of(args.trace))
    result["policies"] = try_policies(batches, model)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
