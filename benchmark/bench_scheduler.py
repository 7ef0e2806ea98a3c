"""What scheduling a long queue costs: 10,000 requests of 2,000 tokens, 1,000 of them running.

    python benchmark/bench_scheduler.py --out FILE

The model is tiny, since only host time counts here: seconds from the call to the first forward
step (which for --batchllm include planning), and milliseconds per step that the scheduler takes
to choose and prepare a batch while requests wait. Stock SGLang and --batchllm, one after the
other on the same machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from batches import Case
from processes import flush, results_of
from results_file import ResultFile
from steps import read_steps, record_steps

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

REQUESTS, RUNNING, VOCABULARY = 10_000, 1_000, 512
BATCH = Case("queue", REQUESTS, 16, 1900, 100, 32)


def run_side(model: str, side: str, requests: int, pipe: Any) -> None:
    """Run the batch on one side and send the figures through `pipe`."""
    from sglang.srt.entrypoints.engine import Engine

    steps_file = Path(tempfile.mkdtemp()) / "steps"
    record_steps(Engine, steps_file)
    engine = Engine(
        model_path=model,
        skip_tokenizer_init=True,
        max_running_requests=RUNNING,
        batchllm=side == "batchllm",
        log_level="error",
    )
    prompts = BATCH.prompts(VOCABULARY)[:requests]
    try:
        sampling = {"temperature": 0, "max_new_tokens": BATCH.output, "ignore_eos": True}
        engine.generate(input_ids=prompts[:64], sampling_params=sampling)
        flush(engine)
        started = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=sampling)
        seconds = time.perf_counter() - started
    finally:
        engine.shutdown()
    steps = [step for step in read_steps(steps_file) if step.start >= started]
    figures: dict[str, Any] = {
        "case": BATCH.name,
        "side": side,
        "requests": len(prompts),
        "intake_seconds": steps[0].start - started,
        "seconds": seconds,
    }
    queued = [step for step in steps if step.waiting]
    kinds = {
        "all": queued,
        "prefill": [step for step in queued if step.prefill_tokens],
        "decode": [step for step in queued if not step.prefill_tokens],
    }
    for kind, chosen in kinds.items():
        if chosen:
            took = np.array([step.schedule_ms for step in chosen])
            figures[kind] = {
                "steps": len(chosen),
                "mean_ms": float(took.mean()),
                "p50_ms": float(np.median(took)),
                "p99_ms": float(np.quantile(took, 0.99)),
                "prefilled_per_step": float(np.mean([s.prefill_requests for s in chosen])),
                "running": float(np.mean([s.decode_requests for s in chosen])),
            }
    pipe.send(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=REQUESTS, help="fewer, for a quick look")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()

    from tiny_model import make_tiny_model

    folder = Path(tempfile.mkdtemp())
    model = make_tiny_model(folder, [__doc__], VOCABULARY, 4096, hidden_size=256, head_dim=64)
    rows = ResultFile(args.out, ("case", "side", "requests"))
    for side in ("batchllm", "stock"):
        for figures in results_of(run_side, str(model), side, args.requests):
            print(json.dumps(rows.add(figures)), flush=True)


if __name__ == "__main__":
    main()
