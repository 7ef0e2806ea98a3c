"""The pictures, from the JSON that the benchmarks wrote.

    python benchmark/draw.py attention benchmark/results/attention.json --out FILE.png
    python benchmark/draw.py cases benchmark/results/offline.json --out FILE.png
    python benchmark/draw.py steps STEPS... --case M5 --out FILE.png

STEPS: files of `bench_offline.py --steps` that have the case for both sides.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cost_model import steps_of

OURS, STOCK = "fused", "stock"
LABELS = {OURS: "--batchllm", STOCK: "stock SGLang"}


def runs_of(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file: a list of them, or with a header around it."""
    data = json.loads(path.read_text())
    return data["runs"] if isinstance(data, dict) else data


def best_runs(runs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The faster run of each case and side, by these two."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["requests_per_second"]):
        best[run["case"], run["side"]] = run
    return best


def draw_attention(path: Path, out: Path) -> None:
    """Milliseconds per layer over each sweep of `bench_attention.py`."""
    data = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    styles = {"ours": "o-", "fa3": "s-", "floor": "k--"}
    for axis, (name, rows) in zip(axes, data["sweeps"].items(), strict=True):
        for series, style in styles.items():
            points = [(row["x"], row[series]) for row in rows if series in row]
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=series, ms=4)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_ylabel("ms per layer")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set_title("512 requests, prefix 2000, suffix 250")
    axes[1].set_title("16 groups of 16, suffix 250")
    axes[2].set_title("32 groups of 16, prefix 2000")
    figure.suptitle(f"Decode attention, 32/8 heads of 128, bf16, {data['device']}")
    _save(figure, out)


def draw_cases(runs: list[dict[str, Any]], out: Path) -> None:
    """Requests per second of stock SGLang's better order, of ours, and of the floor, by case."""
    best = best_runs(runs)
    cases = [case for case in dict.fromkeys(run["case"] for run in runs) if (case, OURS) in best]
    floors = [best[case, OURS]["floor_requests_per_second"] for case in cases]
    series = {
        LABELS[side]: [
            best[case, side]["requests_per_second"] if (case, side) in best else 0.0
            for case in cases
        ]
        for side in (STOCK, OURS)
    }
    figure, axis = plt.subplots(figsize=(1.5 + 1.2 * len(cases), 4))
    for place, (label, values) in enumerate([*series.items(), ("floor", floors)]):
        style = {"fill": False, "edgecolor": "grey"} if label == "floor" else {}
        at = [number + (place - 1) * 0.27 for number in range(len(cases))]
        bars = axis.bar(at, values, 0.25, label=label, **style)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    axis.set_xticks(range(len(cases)), cases)
    axis.set_ylabel("requests per second")
    axis.legend()
    _save(figure, out)


def draw_steps(runs: list[dict[str, Any]], case: str, out: Path) -> None:
    """Tokens of every forward step over time, one panel per side (BatchLLM's figure 2)."""
    best = best_runs(runs)
    figure, axes = plt.subplots(2, 1, figsize=(10, 5), sharex=True, sharey=True)
    for axis, side in zip(axes, (STOCK, OURS), strict=True):
        run = best[case, side]
        steps = steps_of(run)
        seconds = [step.start - steps[0].start for step in steps] + [run["seconds"]]
        bottom = [0 for _ in steps]
        for label, tokens in {
            "decode": [step.decode_requests for step in steps],
            "prefill": [step.prefill_tokens for step in steps],
        }.items():
            top = [low + more for low, more in zip(bottom, tokens, strict=True)]
            axis.stairs(top, seconds, baseline=bottom, fill=True, label=label)
            bottom = top
        axis.set_yscale("symlog", linthresh=100)
        axis.set_ylabel("tokens per step")
        axis.set_title(f"{case}, {LABELS[side]}: {run['requests_per_second']:.1f} requests/s")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper right")
    axes[1].set_xlabel("seconds")
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", choices=["attention", "cases", "steps"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--case", help="whose steps to draw")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.picture == "attention":
        draw_attention(args.files[0], args.out)
        return
    runs = [run for path in args.files for run in runs_of(path)]
    if args.picture == "cases":
        draw_cases(runs, args.out)
    elif args.case is None:
        parser.error("steps needs --case")
    else:
        draw_steps(runs, args.case, args.out)


if __name__ == "__main__":
    main()
