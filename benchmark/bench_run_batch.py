"""Requests per second of an `sgl.function` program over a whole batch, and what stands in its way.

    python benchmark/bench_run_batch.py --model PATH --out FILE

`--model` needs no more than a config.json: weights are random, and where it has no tokenizer, one
(32k entries) is trained on this machine's Python sources, of which the prompts are made. Every side
answers the same prompts (by default 50 documents of 2,000 tokens, 16 questions of 200 about each,
100 tokens of output), in a process of its own that is fresh, after a warm-up, twice; the better is
quoted:

    token ids    Engine.generate with --batchllm
    texts        the same with texts: adds tokenization
    engine       run_batch on that engine: adds tracing, the interpreter and its threads
    server       run_batch on a server with --batchllm: adds HTTP
    stock        run_batch on a server without

Memory and threads are those of the client. What follows a `--` goes to servers and engines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from batches import Case
from processes import engine_of, flush, results_of
from results_file import ResultFile, Row
from servers import starting
from texts import Prompts, make_prompts, model_and_flags

RUNS = 2
SIDES = ["token ids", "texts", "engine", "server", "stock"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder with a config.json")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--degree", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--suffix", type=int, default=200)
    parser.add_argument("--output", type=int, default=100)
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    args = parser.parse_args()
    sizes = (args.requests, args.degree, args.prefix, args.suffix, args.output)
    case = Case("{}, {}, {} / {} / {}".format(*sizes), *sizes)

    file = ResultFile(args.out, ("case", "side", "run"))
    results: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model, flags = model_and_flags(args.model, Path(folder))
        flags += args.flags
        for side in args.sides:
            for result in results_of(run_side, side, model, flags, case):
                results.append(file.add({"case": case.name, **result}))
                print(json.dumps(results[-1]), flush=True)
    print_table(results)


# Sides


Answers = list[dict[str, Any]]
"""The meta information of every answer."""


def run_side(side: str, model: Path, flags: list[str], case: Case, pipe: Any) -> None:
    """Measure one side, and send one result per run through `pipe`."""
    inputs = make_inputs(side, model, make_prompts(case, model, seed=0))
    warm_up = make_inputs(side, model, make_prompts(case, model, seed=1))
    start = server if side in ("server", "stock") else engine
    with start(side, flags, case) as (run, empty_cache):
        run({name: rows[: max(case.requests // 8, 2)] for name, rows in warm_up.items()})
        for number in range(RUNS):
            empty_cache()
            FINISHED.clear()
            with watching_this_process() as seen:
                started = time.perf_counter()
                answers = run(inputs)
                seconds = time.perf_counter() - started
            assert all(answer["completion_tokens"] == case.output for answer in answers)
            prompt_tokens = sum(answer["prompt_tokens"] for answer in answers)
            threads, memory = zip(*seen, strict=True)
            pipe.send(
                {
                    "side": side,
                    "run": number,
                    "seconds": seconds,
                    "requests_per_second": len(answers) / seconds,
                    "first_finished_seconds": FINISHED[0] - started if FINISHED else None,
                    "prompt_tokens": prompt_tokens,
                    "computed_tokens": prompt_tokens - sum(a["cached_tokens"] for a in answers),
                    "client_threads": max(threads),
                    "client_memory_growth_mib": (max(memory) - memory[0]) / 2**20,
                }
            )


def make_inputs(side: str, model: Path, prompts: Prompts) -> dict[str, list[Any]]:
    """The batch as the side takes it: arguments of Engine.generate, or of run_batch."""
    if side in ("engine", "server", "stock"):
        rows = [{"document": document, "question": question} for document, question in prompts]
        return {"batch_kwargs": rows}
    texts = [document + question for document, question in prompts]
    if side == "texts":
        return {"prompt": texts}
    from transformers import AutoTokenizer

    return {"input_ids": AutoTokenizer.from_pretrained(model)(texts)["input_ids"]}


Run = Callable[[dict[str, list[Any]]], Answers]


@contextmanager
def engine(side: str, flags: list[str], case: Case) -> Iterator[tuple[Run, Callable[[], Any]]]:
    started = engine_of([*flags, "--batchllm"])
    sampling = {"temperature": 0, "max_new_tokens": case.output, "ignore_eos": True}

    def generate(inputs: dict[str, list[Any]]) -> Answers:
        return [
            result["meta_info"] for result in started.generate(sampling_params=sampling, **inputs)
        ]

    try:
        yield run_program(started, case) if side == "engine" else generate, partial(flush, started)
    finally:
        started.shutdown()


@contextmanager
def server(side: str, flags: list[str], case: Case) -> Iterator[tuple[Run, Callable[[], Any]]]:
    flags = [*flags, *(["--batchllm"] if side == "server" else [])]
    with starting(flags, f"bench_run_batch-{side}") as started:
        import sglang  # while it starts

        started.wait_until_ready()
        backend = sglang.RuntimeEndpoint(started.url)
        yield run_program(backend, case), backend.flush_cache


FINISHED: list[float] = []
"""When each program had its answer."""


def run_program(backend: Any, case: Case) -> Run:
    import sglang as sgl

    def answer_question(s: Any, document: str, question: str) -> None:
        s += document
        s += question + sgl.gen("answer", max_tokens=case.output)
        if s["answer"] is not None:
            FINISHED.append(time.perf_counter())

    program: Any = sgl.function(answer_question)

    def run(inputs: dict[str, list[Any]]) -> Answers:
        states = program.run_batch(**inputs, backend=backend, temperature=0, ignore_eos=True)
        return [state.get_meta_info("answer") for state in states]

    return run


@contextmanager
def watching_this_process() -> Iterator[list[tuple[int, int]]]:
    """Notes this process's threads and resident bytes twenty times a second."""
    process = psutil.Process()
    seen: list[tuple[int, int]] = []
    over = threading.Event()

    def look() -> None:
        while True:
            seen.append((threading.active_count() - 1, process.memory_info().rss))
            if over.wait(0.05):
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    yield seen
    over.set()
    watcher.join()


def print_table(results: list[Row]) -> None:
    """The better run of each side."""
    columns = {
        "requests/s": "requests_per_second",
        "first (s)": "first_finished_seconds",
        "computed": "computed_tokens",
        "threads": "client_threads",
        "MiB": "client_memory_growth_mib",
    }
    print("".join(f"{word:>12}" for word in ["side", *columns]))
    for side in dict.fromkeys(result["side"] for result in results):
        runs = [result for result in results if result["side"] == side]
        best = max(runs, key=lambda run: run["requests_per_second"])
        cells = [best[key] for key in columns.values()]
        words = [
            "" if c is None else f"{c:,.1f}" if isinstance(c, float) else f"{c:,}" for c in cells
        ]
        print("".join(f"{word:>12}" for word in [side, *words]))


if __name__ == "__main__":
    main()
