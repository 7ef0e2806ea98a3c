"""Requests per second of offline batches, stock SGLang against --batchllm.

    python benchmark/bench_offline.py --model PATH --cases M1 M5 M6 --json FILE

Each side runs in a process of its own per KV pool size, one after the other on the same GPU, and
all its cases in that process, after a warm-up batch of the same shape with other tokens. Stock
SGLang runs every case twice, prompts shuffled and prompts sorted by group, and is quoted at the
better. `--load-format dummy` takes random weights: outputs are meaningless and cost the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

from cases import CASES, Case


def run_side(options: dict[str, Any], cases: list[Case], batchllm: bool, pipe: Any) -> None:
    """Start an engine, run `cases`, send one result per run through `pipe`."""
    import sglang

    if batchllm:
        options = {**options, "batchllm": True}
    engine = sglang.Engine(**options)
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    try:
        for case in cases:
            sampling = {"temperature": 0, "max_new_tokens": case.output, "ignore_eos": True}
            warm_up = case.prompts(vocab_size, seed=1)[: max(case.requests // 8, 1)]
            engine.generate(input_ids=warm_up, sampling_params=sampling)
            orders = ["shuffled"] if batchllm else ["shuffled", "grouped"]
            for order in orders:
                prompts = case.prompts(vocab_size)
                if order == "grouped":
                    prompts.sort()
                engine.flush_cache()
                started = time.perf_counter()
                results = engine.generate(input_ids=prompts, sampling_params=sampling)
                seconds = time.perf_counter() - started
                pipe.send(measure(case, order, batchllm, prompts, results, seconds))
    finally:
        engine.shutdown()


def measure(
    case: Case,
    order: str,
    batchllm: bool,
    prompts: list[list[int]],
    results: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The facts of one run; raises if an output is not as long as was asked for."""
    assert all(r["meta_info"]["completion_tokens"] == case.output for r in results)
    groups = case.requests // case.sharing_degree
    return {
        "case": case.name,
        "side": "batchllm" if batchllm else "stock",
        "order": order,
        "seconds": seconds,
        "requests_per_second": case.requests / seconds,
        "prompt_tokens": sum(map(len, prompts)),
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
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--load-format", default="dummy")
    args = parser.parse_args()

    options: dict[str, Any] = {
        "model_path": args.model,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
        "disable_prefill_cuda_graph": True,
    }
    results: list[dict[str, Any]] = []
    cases = [CASES[name] for name in args.cases]
    context = multiprocessing.get_context("spawn")
    for kv_tokens in dict.fromkeys(case.kv_tokens for case in cases):
        same_pool = [case for case in cases if case.kv_tokens == kv_tokens]
        for batchllm in (True, False):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=run_side,
                args=({**options, "max_total_tokens": kv_tokens}, same_pool, batchllm, sender),
            )
            process.start()
            sender.close()
            try:
                while True:
                    results.append(receiver.recv())
                    print(json.dumps(results[-1]), flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(results, indent=1))
            except EOFError:
                process.join()
    print_table(results)


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"{'case':6}{'stock':>10}{'order':>10}{'batchllm':>10}{'ratio':>8}{'computed':>12}")
    for name in dict.fromkeys(r["case"] for r in results):
        runs = [r for r in results if r["case"] == name]
        ours = [r for r in runs if r["side"] == "batchllm"]
        stock = [r for r in runs if r["side"] == "stock"]
        if not ours or not stock:
            continue
        best = max(stock, key=lambda r: r["requests_per_second"])
        ratio = ours[0]["requests_per_second"] / best["requests_per_second"]
        share = ours[0]["computed_tokens"] / ours[0]["distinct_tokens"]
        print(
            f"{name:6}{best['requests_per_second']:10.1f}{best['order']:>10}"
            f"{ours[0]['requests_per_second']:10.1f}{ratio:8.2f}{share:11.4f}x"
        )


if __name__ == "__main__":
    main()
