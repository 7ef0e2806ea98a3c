"""Requests per second of offline batches, stock SGLang against --batchllm.

    python benchmark/bench_offline.py --model PATH --cases M1 M5 M6 --sides fused stock --out FILE

Sides: stock SGLang with and without its prefix cache, and --batchllm with fused and with native
attention. Each side runs in a process of its own per KV pool size, one after the other on the same
GPU, and all its cases in that process, each after a warm-up batch of the same shape with other
tokens. Stock SGLang (with its cache) runs every case twice, prompts shuffled and prompts sorted by
group, and is quoted at the better. Whatever is not named here is as SGLang has it by default, on
every side: prefill runs in CUDA graphs where SGLang does that. FILE keeps what other commands have
put there of other cases, sides and orders, and is written after each run. `--load-format dummy`
takes random weights: outputs are meaningless and cost the same. `--options '{"dp_size": 2}'` runs
two replicas, `tp_size` puts the model on two GPUs; a row's floor is that of one GPU, always.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batches import CASES, ORDERS, Batch
from endings import end_as_drawn, ending_after
from processes import flush, results_of
from results_file import ResultFile
from roofline import ModelShape, floor
from shapes import SHAPES, model_folder
from steps import read_steps, record_steps

SIDES = {
    "fused": {"batchllm": True, "batchllm_attention": "fused"},
    "native": {"batchllm": True, "batchllm_attention": "native"},
    "stock": {},
    "uncached": {"disable_radix_cache": True},
}
DEFAULT_SIDES = ["fused", "native", "stock"]

ENGINE_OPTIONS = {"skip_tokenizer_init": True, "log_level": "error"}


def run_side(
    options: dict[str, Any],
    cases: Sequence[Batch],
    side: str,
    orders: Sequence[str],
    steps: bool,
    pipe: Any,
) -> None:
    """Start an engine, run `cases`, send one result per run through `pipe`. orders: stock's."""
    from sglang.srt.entrypoints.engine import Engine

    steps_file = Path(tempfile.mkdtemp()) / "steps"
    if steps:
        record_steps(Engine, steps_file)
    end_as_drawn(Engine)
    engine = Engine(**options, **SIDES[side])
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    try:
        for case in cases:
            warm_up = case.prompts(vocab_size, seed=1)[: max(case.requests // 8, 1)]
            sampling = sampling_of(case, case.output, vocab_size)
            engine.generate(input_ids=warm_up, sampling_params=sampling)
            for order in orders if side == "stock" else ["shuffled"]:
                pairs = list(zip(case.prompts(vocab_size), case.outputs(), strict=True))
                if order == "grouped":
                    pairs.sort()
                prompts = [prompt for prompt, _ in pairs]
                samplings = [sampling_of(case, output, vocab_size) for _, output in pairs]
                flush(engine)
                started = time.perf_counter()
                results = engine.generate(input_ids=prompts, sampling_params=samplings)
                seconds = time.perf_counter() - started
                result = measure(case, order, side, pairs, results, seconds)
                if steps:
                    ran = (step for step in read_steps(steps_file) if step.start >= started)
                    if "chunked_prefill_size" in options:
                        result["chunk"] = options["chunked_prefill_size"]
                    result["steps"] = [[round(x, 5) for x in asdict(step).values()] for step in ran]
                pipe.send(result)
    finally:
        engine.shutdown()


def sampling_of(case: Batch, output: int, vocab_size: int) -> dict[str, Any]:
    """Sampling parameters of a request of `case` with `output` tokens of output."""
    if case.limit is not None:
        return ending_after(output, case.limit, stop_token=vocab_size - 1)
    return {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}


def measure(
    case: Batch,
    order: str,
    side: str,
    pairs: list[tuple[list[int], int]],
    results: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The facts of one run; raises if an output is not as long as was drawn for it, or did not end
    for the reason that the case is about."""
    drawn = [output for _, output in pairs]
    infos = [result["meta_info"] for result in results]
    assert [info["completion_tokens"] for info in infos] == drawn
    reasons = ["length" if case.limit in (None, output) else "stop" for output in drawn]
    assert [info["finish_reason"]["type"] for info in infos] == reasons
    return {
        "case": case.name,
        "side": side,
        "order": order,
        "seconds": seconds,
        "requests_per_second": case.requests / seconds,
        "prompt_tokens": sum(len(prompt) for prompt, _ in pairs),
        "distinct_tokens": case.distinct_tokens,
        "computed_tokens": sum(info["prompt_tokens"] - info["cached_tokens"] for info in infos),
        "retractions": sum(info["num_retractions"] for info in infos),
    }


def run_all(args: argparse.Namespace, cases: Sequence[Batch]) -> list[dict[str, Any]]:
    """Run every case on every side; write and print each row as it comes, and return them.

    args: as from `argument_parser`.
    """
    model = model_folder(args.model)
    options: dict[str, Any] = {
        "model_path": model,
        "load_format": args.load_format,
        **ENGINE_OPTIONS,
        **args.options,
    }
    shape = ModelShape.of(json.loads((Path(model) / "config.json").read_text()))
    floors = {case.name: case.requests / floor(case, shape).seconds for case in cases}
    file = ResultFile(args.out, ("model", "engine_options", "case", "side", "order"))
    about = {"model": Path(args.model).name, "engine_options": args.options}
    results: list[dict[str, Any]] = []
    recorded: list[dict[str, Any]] = []
    for kv_tokens in dict.fromkeys(case.kv_tokens for case in cases):
        same_pool = [case for case in cases if case.kv_tokens == kv_tokens]
        for side in args.sides:
            of_pool = {**options, "max_total_tokens": kv_tokens}
            recording = args.steps is not None
            for result in results_of(run_side, of_pool, same_pool, side, args.orders, recording):
                if recording:
                    recorded.append({**result})
                    args.steps.write_text(json.dumps(recorded))
                    del result["steps"]
                result["floor_requests_per_second"] = floors[result["case"]]
                results.append(file.add({**about, **result}))
                print(json.dumps(results[-1]), flush=True)
    return results


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", required=True, help=f"model folder, or the shapes of one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=DEFAULT_SIDES)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, help="of stock")
    parser.add_argument("--steps", type=Path, help="record every forward step in this file")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="more engine arguments for every side (JSON)"
    )
    return parser


def main() -> None:
    parser = argument_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    print_table(run_all(args, [CASES[name] for name in args.cases]))


def print_table(results: list[dict[str, Any]]) -> None:
    """Requests per second of each side, the ratio to stock's better order, the floor and the
    share of it that the first side reaches, and prompt tokens computed per distinct one."""
    sides = list(dict.fromkeys(r["side"] for r in results))
    columns = ["case", *sides, "ratio", "floor", "reached", "computed"]
    print("".join(f"{word:>12}" for word in columns))
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
        fastest = first["floor_requests_per_second"]
        reached = f"{first['requests_per_second'] / fastest:.2f}"
        cells = [name, *row, ratio, f"{fastest:.1f}", reached, computed]
        print("".join(f"{word:>12}" for word in cells))


if __name__ == "__main__":
    main()
