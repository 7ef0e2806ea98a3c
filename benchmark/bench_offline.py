"""Requests per second of offline batches, stock SGLang against --batchllm.

    python benchmark/bench_offline.py --model PATH --cases M1 M5 M6 --json FILE

Sides: stock SGLang, and --batchllm with fused and with native attention. Each side runs in a
process of its own per KV pool size, one after the other on the same GPU, and all its cases in
that process, each after a warm-up batch of the same shape with other tokens. Stock SGLang runs
every case twice, prompts shuffled and prompts sorted by group, and is quoted at the better.
`--load-format dummy` takes random weights: outputs are meaningless and cost the same. With
`--profile`, one more run of each case says where a decode step's GPU time goes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steps import read_steps, record_steps
from traces import decode_step

from cases import CASES, Case

PROFILED_STEPS = 4


SIDES = {
    "fused": {"batchllm": True, "batchllm_attention": "fused"},
    "native": {"batchllm": True, "batchllm_attention": "native"},
    "stock": {},
}


def run_side(
    options: dict[str, Any], cases: list[Case], side: str, profile: bool, steps: bool, pipe: Any
) -> None:
    """Start an engine, run `cases`, send one result per run through `pipe`."""
    from sglang.srt.entrypoints.engine import Engine

    steps_file = Path(tempfile.mkdtemp()) / "steps"
    if steps:
        record_steps(Engine, steps_file)
    engine = Engine(**options, **SIDES[side])
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    try:
        for case in cases:
            warm_up = case.prompts(vocab_size, seed=1)[: max(case.requests // 8, 1)]
            engine.generate(input_ids=warm_up, sampling_params=_sampling(case.output))
            orders = ["shuffled", "grouped"] if side == "stock" else ["shuffled"]
            for order in orders:
                pairs = list(zip(case.prompts(vocab_size), case.outputs(), strict=True))
                if order == "grouped":
                    pairs.sort()
                prompts = [prompt for prompt, _ in pairs]
                sampling = [_sampling(output) for _, output in pairs]
                engine.flush_cache()
                started = time.perf_counter()
                results = engine.generate(input_ids=prompts, sampling_params=sampling)
                seconds = time.perf_counter() - started
                result = measure(case, order, side, pairs, results, seconds)
                if steps:
                    time.sleep(0.5)  # until the scheduler has flushed its file
                    ran = (step for step in read_steps(steps_file) if step.start >= started)
                    result["steps"] = [[round(x, 5) for x in asdict(step).values()] for step in ran]
                if profile and order == "shuffled":
                    with tempfile.TemporaryDirectory() as folder:
                        engine.flush_cache()
                        engine.start_profile(
                            output_dir=folder,
                            num_steps=PROFILED_STEPS,
                            profile_by_stage=True,
                            activities=["GPU"],
                            with_stack=False,
                            record_shapes=False,
                        )
                        engine.generate(input_ids=prompts, sampling_params=sampling)
                        result["decode_step"] = decode_step(Path(folder), PROFILED_STEPS)
                pipe.send(result)
    finally:
        engine.shutdown()


def _sampling(output: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}


def measure(
    case: Case,
    order: str,
    side: str,
    pairs: list[tuple[list[int], int]],
    results: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The facts of one run; raises if an output is not as long as was asked for."""
    asked = [output for _, output in pairs]
    assert [r["meta_info"]["completion_tokens"] for r in results] == asked
    groups = case.requests // case.sharing_degree
    return {
        "case": case.name,
        "side": side,
        "order": order,
        "seconds": seconds,
        "requests_per_second": case.requests / seconds,
        "prompt_tokens": sum(len(prompt) for prompt, _ in pairs),
        "distinct_tokens": groups * case.prefix + case.requests * case.suffix,
        "computed_tokens": sum(
            r["meta_info"]["prompt_tokens"] - r["meta_info"]["cached_tokens"] for r in results
        ),
        "retractions": sum(r["meta_info"]["num_retractions"] for r in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--profile", action="store_true", help="profile decode steps too")
    parser.add_argument("--steps", type=Path, help="record every forward step in this file")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="more engine arguments for every side (JSON)"
    )
    args = parser.parse_args()

    options: dict[str, Any] = {
        "model_path": args.model,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
        "disable_prefill_cuda_graph": True,
        "log_level": "error",
        **args.options,
    }
    results: list[dict[str, Any]] = []
    recorded: list[dict[str, Any]] = []
    cases = [CASES[name] for name in args.cases]
    context = multiprocessing.get_context("spawn")
    for kv_tokens in dict.fromkeys(case.kv_tokens for case in cases):
        same_pool = [case for case in cases if case.kv_tokens == kv_tokens]
        for side in args.sides:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=run_side,
                args=(
                    {**options, "max_total_tokens": kv_tokens},
                    same_pool,
                    side,
                    args.profile,
                    args.steps is not None,
                    sender,
                ),
            )
            process.start()
            sender.close()
            try:
                while True:
                    results.append(receiver.recv())
                    if args.steps:
                        recorded.append({**results[-1]})
                        args.steps.write_text(json.dumps(recorded))
                        del results[-1]["steps"]
                    print(json.dumps(results[-1]), flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(results, indent=1))
            except EOFError:
                process.join()
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    """Requests per second of each side, and the ratio to stock's better order."""
    sides = list(dict.fromkeys(r["side"] for r in results))
    print("".join(f"{word:>12}" for word in ["case", *sides, "ratio", "computed"]))
    for name in dict.fromkeys(r["case"] for r in results):
        best: dict[str, dict[str, Any]] = {}
        for run in results:
            if run["case"] == name:
                faster = best.get(run["side"], run)
                best[run["side"]] = max(run, faster, key=lambda r: r["requests_per_second"])
        row = [f"{best[side]['requests_per_second']:.1f}" if side in best else "" for side in sides]
        first = best[next(iter(best))]
        ratio = ""
        if "stock" in best:
            ratio = f"{first['requests_per_second'] / best['stock']['requests_per_second']:.2f}"
        computed = f"{first['computed_tokens'] / first['distinct_tokens']:.4f}"
        print("".join(f"{word:>12}" for word in [name, *row, ratio, computed]))


if __name__ == "__main__":
    main()
