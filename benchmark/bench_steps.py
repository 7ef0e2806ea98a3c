"""Where the GPU time of prefill and decode steps goes, stock SGLang against --batchllm.

    python benchmark/bench_steps.py --model PATH --out FILE

Batches from the few requests of a batch's end to a full one are run once to warm up and once under
SGLang's profiler, which records the first `STEPS` prefill steps and the first `STEPS` decode steps.
Each side runs in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batches import Case
from bench_offline import ENGINE_OPTIONS, SIDES
from processes import flush, results_of
from results_file import ResultFile, Row
from traces import STAGES, mean_step, wait_for_trace

STEPS = 6
CASES = [
    Case("8 requests", 8, 1, 2000, 1000, 40),
    Case("24 requests", 24, 2, 2000, 500, 40),
    Case("148 requests", 148, 4, 2000, 250, 40),
    Case("276 requests", 276, 6, 2000, 300, 40),
    Case("800 requests", 800, 16, 2000, 250, 40),
]


def run_side(options: dict[str, Any], side: str, pipe: Any) -> None:
    """Start an engine, profile every case, send a row per case and stage through `pipe`."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**options, **SIDES[side])
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    try:
        for case in CASES:
            prompts = case.prompts(vocab_size)
            sampling = {"temperature": 0, "max_new_tokens": case.output, "ignore_eos": True}
            engine.generate(input_ids=prompts, sampling_params=sampling)
            flush(engine)
            with tempfile.TemporaryDirectory() as folder:
                engine.start_profile(
                    output_dir=folder,
                    num_steps=STEPS,
                    profile_by_stage=True,
                    activities=["GPU"],
                    with_stack=False,
                    record_shapes=False,
                )
                engine.generate(input_ids=prompts, sampling_params=sampling)
                pipe.send(rows(case, side, Path(folder)))
    finally:
        engine.shutdown()


def rows(case: Case, side: str, folder: Path) -> list[Row]:
    """A row per stage; the smallest batches have fewer than STEPS prefill steps."""
    stages = [stage for stage in STAGES if stage == "decode" or case.requests > 100]
    return [
        {
            "case": case.name,
            "side": side,
            "stage": stage,
            **mean_step(wait_for_trace(folder, stage), STEPS),
        }
        for stage in stages
    ]


def print_table(results: Sequence[Row]) -> None:
    columns = ("gpu_ms", "idle_ms", "matrices_ms", "attention_ms", "other_ms")
    print(f"{'':24}{'side':>8}" + "".join(f"{name:>14}" for name in columns))
    for row in results:
        cells = "".join(f"{row[name]:>14.2f}" for name in columns)
        print(f"{row['case'] + ', ' + row['stage']:24}{row['side']:>8}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=["fused", "stock"])
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    options = {"model_path": args.model, "load_format": "dummy", **ENGINE_OPTIONS}
    file = ResultFile(args.out, ("case", "side", "stage"))
    results: list[Row] = []
    for side in args.sides:
        for rows_of_case in results_of(run_side, options, side):
            results += [file.add(row) for row in rows_of_case]
    print_table(results)


if __name__ == "__main__":
    main()
