"""Requests per second of `batchllm run`, beside the same prompts as texts and stock SGLang's chat.

    python benchmark/bench_batch_rate.py                     a tiny model, on any machine
    python benchmark/bench_batch_rate.py --model llama-8b --cases M1 M5 --out FILE

`--model` needs no more than a config.json: weights are random, and where it has no tokenizer, one
(32k entries) is trained on this machine's Python sources, of which the prompts are made. With the
tiny model, cases have a tenth of the requests, each a tenth as long. Every side answers the same
chat requests:

    texts        Engine.generate with --batchllm, the chat template applied beforehand
    stock texts  Engine.generate without, shuffled and sorted by document; the better is quoted
    batch file   `batchllm run --url` on a server with --batchllm: a file in, a file out
    stock chat   a server without, asked by a client that sends all requests at once, shuffled and
                 sorted by document; the better is quoted

each in an engine or server of its own, which is fresh and serves the cases with its KV pool one
after the other, each after a warm-up with other texts. The command's time is that of its process,
and what it says itself of the time since it sent its first request. That the prompts have the same
tokens on all sides, and the answers their full length, is checked. What follows a `--` goes to
engines and servers. `--url` saves the start of a server, which has to have the same model and
--enable-cache-report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batches import CASES, ORDERS, Case
from processes import engine_of, flush, results_of
from results_file import ResultFile, Row
from servers import Usage, ask_all, encoded, flush_cache, session, starting, usage_of
from texts import Body, batch_lines, chat_bodies, make_prompts, model_and_flags, shrunk

COMMAND = [sys.executable, "-c", "from sglang_batchllm.client.command import main; main()"]
"""`batchllm`, wherever it is installed."""


@dataclass(frozen=True)
class Setup:
    """What all sides have in common. folder: where the requests' files are. orders: in which stock
    gets its requests. url: of a server that runs already."""

    model: Path
    flags: list[str]
    folder: Path
    runs: int
    orders: Sequence[str]
    url: str | None

    def file(self, case: Case) -> Path:
        """The batch file of a case."""
        return self._file(case, "", seed=0)

    def warm_up_file(self, case: Case) -> Path:
        degree = case.sharing_degree
        groups = max(case.requests // 8 // degree, 1)
        return self._file(replace(case, requests=groups * degree), "-warm-up", seed=1)

    def _file(self, case: Case, suffix: str, seed: int) -> Path:
        path = self.folder / f"{case.name}{suffix}.jsonl"
        if not path.exists():
            bodies = chat_bodies(make_prompts(case, self.model, seed), case.output)
            path.write_text("".join(batch_lines(bodies)))
        return path


def bodies_in(file: Path) -> list[Body]:
    return [json.loads(line)["body"] for line in file.read_bytes().splitlines()]


# Sides


def run_texts(setup: Setup, cases: Sequence[Case], flags: list[str], pipe: Any) -> None:
    """In a process of its own: a result per run through `pipe`."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(setup.model)

    def prompts(bodies: list[Body]) -> list[str]:
        return [
            tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
            for body in bodies
        ]

    inputs = [
        (case, prompts(bodies_in(setup.warm_up_file(case))), bodies_in(setup.file(case)))
        for case in cases
    ]
    engine = engine_of([*setup.flags, *flags])
    try:
        for case, warm_up, bodies in inputs:
            sampling = {"temperature": 0, "max_new_tokens": case.output, "ignore_eos": True}
            engine.generate(warm_up, sampling)
            for order in ORDERS[:1] if flags else setup.orders:
                places = places_in(order, bodies)
                texts = prompts([bodies[place] for place in places])
                for run in range(setup.runs):
                    flush(engine)
                    started = time.perf_counter()
                    results = engine.generate(texts, sampling)
                    seconds = time.perf_counter() - started
                    infos = [result["meta_info"] for result in results]
                    usages = [
                        Usage(one["prompt_tokens"], one["cached_tokens"], one["completion_tokens"])
                        for one in infos
                    ]
                    row = {"order": order, "run": run, "seconds": seconds}
                    pipe.send((case, row, as_in_file(places, usages)))
    finally:
        engine.shutdown()


def places_in(order: str, bodies: Sequence[Body]) -> list[int]:
    """The places in the file, in the order in which they are asked."""
    places = list(range(len(bodies)))
    if order == "grouped":
        places.sort(key=lambda place: bodies[place]["messages"][0]["content"])
    return places


def as_in_file(places: list[int], answers: Sequence[Usage]) -> list[Usage]:
    by_place = dict(zip(places, answers, strict=True))
    return [by_place[place] for place in range(len(places))]


Result = tuple[Case, Row, list[Usage]]
"""What is special of a run, and the tokens of its requests as they stand in the file."""


def texts_side(flags: list[str], setup: Setup, cases: Sequence[Case]) -> Iterator[Result]:
    with contextlib.closing(results_of(run_texts, setup, cases, flags)) as results:
        yield from results


def batch_file_side(setup: Setup, cases: Sequence[Case]) -> Iterator[Result]:
    flags = [*setup.flags, "--batchllm", "--enable-cache-report"]
    with starting(flags, "batch-file", setup.url) as server:
        files = [(case, setup.warm_up_file(case), setup.file(case)) for case in cases]
        server.wait_until_ready()
        for case, warm_up, file in files:
            run_command(warm_up, server.url)
            for run in range(setup.runs):
                asyncio.run(flush_server(server.url))
                row, usages = run_command(file, server.url)
                yield case, {"order": "shuffled", "run": run, **row}, usages


def run_command(file: Path, url: str) -> tuple[Row, list[Usage]]:
    """`batchllm run` of a batch file on a server."""
    with tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "answers.jsonl", Path(folder) / "report.json"
        command = [*COMMAND, "run", "-i", str(file), "-o", str(output)]
        command += ["--url", url, "--report", str(report)]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(f"batchllm run ended with {done.returncode}: {done.stderr}")
        told = json.loads(report.read_text())
        records = [json.loads(line) for line in output.read_bytes().splitlines()]
    failed = [record for record in records if (record["response"] or {}).get("status_code") != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]}")
    records.sort(key=lambda record: int(record["custom_id"]))
    row = {
        "seconds": seconds,
        "job_seconds": told["seconds"],
        "running_seconds": told["seconds_running"],
        "running_requests_per_second": told["requests_per_second"],
        "computed_tokens_by_report": told["computed_tokens"],
        "distinct_tokens_by_plan": told["plan"]["distinct_tokens"],
        "engine_deaths": told["engine_deaths"],
    }
    return row, [usage_of(record["response"]["body"]) for record in records]


def stock_side(setup: Setup, cases: Sequence[Case]) -> Iterator[Result]:
    flags = [*setup.flags, "--enable-cache-report"]
    with starting(flags, "stock-chat", setup.url) as server:
        inputs = [
            (case, bodies_in(setup.warm_up_file(case)), bodies_in(setup.file(case)))
            for case in cases
        ]
        server.wait_until_ready()
        for case, warm_up, bodies in inputs:
            asyncio.run(chat(server.url, warm_up))
            for order in setup.orders:
                places = places_in(order, bodies)
                for run in range(setup.runs):
                    asyncio.run(flush_server(server.url))
                    seconds, answers = asyncio.run(
                        chat(server.url, [bodies[place] for place in places])
                    )
                    row = {"order": order, "run": run, "seconds": seconds}
                    yield case, row, as_in_file(places, answers)


async def chat(url: str, bodies: Sequence[Body]) -> tuple[float, list[Usage]]:
    """All at once; the seconds from the first byte sent to the last one read."""
    sent = encoded(bodies)
    async with session(url) as http:
        started = time.perf_counter()
        answers = await ask_all(http, sent)
        seconds = time.perf_counter() - started
    return seconds, [usage_of(json.loads(answer)) for answer in answers]


async def flush_server(url: str) -> None:
    async with session(url) as http:
        await flush_cache(http)


SIDES: dict[str, Callable[[Setup, Sequence[Case]], Iterator[Result]]] = {
    "texts": functools.partial(texts_side, ["--batchllm"]),
    "stock texts": functools.partial(texts_side, []),
    "batch file": batch_file_side,
    "stock chat": stock_side,
}


# Results


def figures(case: Case, usages: Sequence[Usage], seconds: float) -> Row:
    """Raises ValueError if an answer has not its full length."""
    wrong = [usage for usage in usages if usage.completion != case.output]
    if len(usages) != case.requests or wrong:
        raise ValueError(f"{len(usages)} answers, of which {len(wrong)} have not {case.output}")
    return {
        "requests_per_second": case.requests / seconds,
        "prompt_tokens": sum(usage.prompt for usage in usages),
        "computed_tokens": sum(usage.prompt - usage.cached for usage in usages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder with a config.json")
    names = [name for name, case in CASES.items() if case.prefix and not case.longest_output]
    parser.add_argument("--cases", nargs="+", choices=names, default=["M1", "M5"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS, help="of stock")
    parser.add_argument("--runs", type=int, default=1, help="of each side and order")
    parser.add_argument("--url", help="a server that runs already, for the one of --sides")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    args = parser.parse_args()
    if args.url and args.sides not in (["batch file"], ["stock chat"]):
        parser.error("--url is for one side that has a server: name it with --sides")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers end, too

    cases = [CASES[name] if args.model else shrunk(CASES[name]) for name in args.cases]
    file = ResultFile(args.out, ("case", "side", "order", "run"))
    rows: list[Row] = []
    lengths: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, flags = model_and_flags(args.model, folder / "model")
        for kv_tokens in dict.fromkeys(case.kv_tokens for case in cases):
            same_pool = [case for case in cases if case.kv_tokens == kv_tokens]
            pool = [] if kv_tokens is None else ["--max-total-tokens", str(kv_tokens)]
            flags_of_pool = [*flags, *args.flags, *pool]
            setup = Setup(model, flags_of_pool, folder, args.runs, args.orders, args.url)
            for side in args.sides:
                started = time.perf_counter()
                for case, row, usages in SIDES[side](setup, same_pool):
                    prompts = [usage.prompt for usage in usages]
                    if lengths.setdefault(case.name, prompts) != prompts:
                        raise ValueError(f"{side} has other prompts than the sides before it")
                    about = {"case": case.name, "side": side, **row}
                    rows.append(file.add({**about, **figures(case, usages, row["seconds"])}))
                    print(json.dumps(rows[-1]), flush=True)
                print(f"{side}: {time.perf_counter() - started:.0f} s in all", flush=True)
    print_table(rows)


def print_table(rows: Sequence[Row]) -> None:
    """Requests per second, the best run of each side, and ratios of the batch file's to others."""
    titles = ["batch file", "texts", "stock texts", "stock chat", "/ texts", "/ stock chat"]
    print(f"{'case':<16}{'measured':<26}" + "".join(f"{title:>13}" for title in titles))
    for case in dict.fromkeys(row["case"] for row in rows):
        texts, stock_texts, stock = (
            best(rows, case, side) for side in ("texts", "stock texts", "stock chat")
        )
        for measured, prefix in (("whole command", ""), ("since its first request", "running_")):
            ours = best(rows, case, "batch file", f"{prefix}requests_per_second")
            rates = [f"{rate:.1f}" if rate else "" for rate in (ours, texts, stock_texts, stock)]
            ratios = [f"{ours / rate:.3f}" if ours and rate else "" for rate in (texts, stock)]
            cells = "".join(f"{cell:>13}" for cell in rates + ratios)
            print(f"{case:<16}{measured:<26}{cells}")


def best(
    rows: Sequence[Row], case: str, side: str, key: str = "requests_per_second"
) -> float | None:
    runs = [row[key] for row in rows if (row["case"], row["side"]) == (case, side)]
    return max(runs, default=None)


if __name__ == "__main__":
    main()
