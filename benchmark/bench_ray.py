"""Ray Data on replicas: our stage against Ray's own with stock SGLang, over the same rows.

    python benchmark/bench_ray.py --out FILE        two replicas of a tiny model, without a GPU
    python benchmark/bench_ray.py --model PATH --out FILE       a GPU for each

Rows are questions about documents, shuffled. Everything of Ray's has its default: batches of 32
rows, eight of them in a replica at a time. Each side runs in a process and a Ray of its own.
`seconds` is from the first row that reaches an engine to the last that SGLang exported as answered
(`--export-metrics-to-file`; Ray ends an actor at once after its last row, and some of the last may
miss that), `job_seconds` has Ray's and the engines' start in it, too. Cached tokens are in our
rows; Ray's don't have them, and there all must have been exported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batches import Case
from processes import results_of
from results_file import ResultFile, Row
from texts import Body, chat_bodies, make_prompts, model_and_flags

SIDES = ("batchllm", "stock")
ORDER = "order"
"""The column that says which row it is."""


def run_side(
    side: str, model: Path, bodies: list[Body], replicas: int, gpus: bool, options: Row, pipe: Any
) -> None:
    """Sends the job's seconds, the answers in the order of the rows, and what SGLang exported."""
    import ray
    from ray.data.llm import SGLangEngineProcessorConfig, build_processor

    from sglang_batchllm.ray_data.processor import BatchLLMProcessorConfig

    # Ray's stage asks for a GPU; it needs to be there for Ray only. Steps of Ray's mostly sleep.
    there = {} if gpus else {"num_cpus": replicas + 6, "num_gpus": replicas}
    ray.init(include_dashboard=False, **there)
    kind = BatchLLMProcessorConfig if side == "batchllm" else SGLangEngineProcessorConfig
    with tempfile.TemporaryDirectory() as folder, reading(Path(folder)) as exported:
        options = options | {"export_metrics_to_file": True, "export_metrics_to_file_dir": folder}
        processor = build_processor(
            kind(model_source=str(model), concurrency=replicas, engine_kwargs=options),
            preprocess=lambda row: row,
            postprocess=lambda row: {
                ORDER: row[ORDER],
                "text": row["generated_text"],
                "prompt_tokens": row["num_input_tokens"],
                "output_tokens": row["num_generated_tokens"],
                "cached_tokens": row.get("num_cached_tokens"),
            },
        )
        started = time.perf_counter()
        rows = processor(ray.data.from_items(rows_of(bodies)))
        answers = {row[ORDER]: row for row in rows.take_all()}
        seconds = time.perf_counter() - started
    pipe.send((seconds, [answers[i] for i in range(len(bodies))], exported))


@contextmanager
def reading(folder: Path) -> Iterator[list[tuple[float, Row]]]:
    """The records that processes append to files in there, each with the time when it was seen,
    which they don't say."""
    seen: list[tuple[float, Row]] = []
    over = threading.Event()

    def read() -> None:
        done: dict[Path, int] = {}
        while True:
            last = over.is_set()
            for file in folder.iterdir():
                *lines, _ = file.read_bytes()[done.get(file, 0) :].split(b"\n")
                done[file] = done.get(file, 0) + sum(len(line) + 1 for line in lines)
                seen.extend((time.time(), json.loads(line)) for line in lines)
            if last:
                return
            over.wait(0.05)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield seen
    finally:
        over.set()
        reader.join()


def rows_of(bodies: list[Body]) -> list[Row]:
    """As Ray's stages take them, with SGLang's parameters."""
    return [
        {
            ORDER: order,
            "messages": body["messages"],
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": body["max_tokens"],
                "ignore_eos": True,
            },
        }
        for order, body in enumerate(bodies)
    ]


def figures(seconds: float, answers: list[Row], exported: list[tuple[float, Row]]) -> Row:
    """Raises ValueError if what was cached is not known of all."""
    begun = min(at - fact["e2e_latency"] for at, fact in exported)
    ended = max(at for at, _ in exported)
    cached = [answer["cached_tokens"] for answer in answers]
    if None in cached:
        cached = [fact["cached_tokens"] for _, fact in exported]
    if len(cached) != len(answers):
        raise ValueError(f"of {len(answers)} requests {len(cached)} were exported")
    prompt_tokens = sum(answer["prompt_tokens"] for answer in answers)
    return {
        "rows": len(answers),
        "exported": len(exported),
        "prompt_tokens": prompt_tokens,
        "computed_tokens": prompt_tokens - sum(cached),
        "output_tokens": sum(answer["output_tokens"] for answer in answers),
        "seconds": round(ended - begun, 2),
        "job_seconds": round(seconds, 2),
    }


def distinct_tokens(model: Path, bodies: list[Body]) -> int:
    from transformers import AutoTokenizer

    from sglang_batchllm import plan_batch

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=False
        )
        for body in bodies
    ]
    return plan_batch(prompts, 1).report.distinct_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder, instead of a tiny random model")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=960)
    parser.add_argument("--degree", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=400)
    parser.add_argument("--suffix", type=int, default=40)
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument(
        "--kv", nargs="+", type=int, help="KV tokens of a replica; default: its own"
    )
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    sizes = (args.requests, args.degree, args.prefix, args.suffix, args.output)
    case = Case("{}, {}, {} / {} / {}".format(*sizes), *sizes)

    file = ResultFile(args.out, ("case", "replicas", "kv_tokens", "side"))
    with tempfile.TemporaryDirectory() as folder:
        model, _ = model_and_flags(args.model, Path(folder))
        options: Row = {} if args.model else {"dtype": "float32"}
        bodies = chat_bodies(make_prompts(case, model, seed=0), case.output)
        distinct = distinct_tokens(model, bodies)
        for kv in args.kv or [None]:
            memory = {"max_total_tokens": kv} if kv else {}
            said: list[list[str]] = []
            for side in args.sides:
                common = (args.replicas, args.model is not None, options | memory)
                (found,) = results_of(run_side, side, model, bodies, *common)
                seconds, answers, exported = found
                texts = [answer["text"] for answer in answers]
                said.append(texts)
                row = {"case": case.name, "replicas": args.replicas, "kv_tokens": kv, "side": side}
                same = sum(a == b for a, b in zip(said[0], texts, strict=True))
                row |= {"distinct_tokens": distinct, **figures(seconds, answers, exported)}
                row |= {f"same_texts_as_{args.sides[0]}": same}
                print(json.dumps(file.add(row)), flush=True)


if __name__ == "__main__":
    main()
