"""Many HTTP clients with one request each at a time: what --batchllm makes of a stream.

    python benchmark/bench_clients.py --clients 100 200 --out FILE      a tiny model, on any machine
    python benchmark/bench_clients.py --model PATH --out FILE -- --load-format dummy
    python benchmark/bench_clients.py --model PATH --clients 500 --case classify ...

Nobody knows the batch beforehand here: every client sends the next prompt of a common, shuffled
list once its last answer is there; bodies are encoded beforehand. Counted are the forward steps
that the server takes, prompt tokens computed, requests per second and latency, on stock SGLang and
on --batchllm, each in a fresh process, after a round to warm up. What follows a `--` goes to both
servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from batches import CASES, Case
from processes import results_of
from results_file import ResultFile, Row
from servers import encoded, flush_cache
from steps import Step, read_steps, record_steps

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

VOCABULARY = 512
SIDES = ("batchllm", "stock")
JSON = {"Content-Type": "application/json"}
ROUNDS = 8
"""Requests of each client."""


def case_of(clients: int, name: str | None) -> Case:
    """Groups of eight, with outputs of different lengths, so that clients do not go in step; or a
    case of batches.py."""
    if name is not None:
        return replace(CASES[name], name=f"{clients} clients, {name}")
    return Case(f"{clients} clients", clients * ROUNDS, 8, 200, 20, 16, longest_output=64)


def run_side(
    flags: list[str], side: str, clients: Sequence[int], name: str | None
) -> Iterator[Row]:
    """Serve every case on one side; a row per case."""
    steps_file = Path(tempfile.mkdtemp()) / "steps"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [*flags, "--port", str(port), *(["--batchllm"] if side == "batchllm" else [])]
    server = results_of(serve, flags, steps_file)
    with contextlib.closing(server):
        vocabulary = next(server)
        for count in clients:
            case = case_of(count, name)
            url = f"http://127.0.0.1:{port}"
            started, seconds, answers = asyncio.run(measure(url, case, count, vocabulary))
            ran = [step for step in read_steps(steps_file) if step.start >= started]
            yield {"case": case.name, "side": side, **figures(answers, ran, seconds)}


def serve(flags: list[str], steps_file: Path, pipe: Any) -> None:
    """Run a server that records its steps; sends the size of its vocabulary once it is up."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    record_steps(Engine, steps_file)
    args = prepare_server_args([*flags, "--log-level", "error"])
    launch_server(
        args,
        run_scheduler_process_func=Engine.run_scheduler_process_func,
        launch_callback=lambda: pipe.send(args.get_model_config().vocab_size),
    )


async def measure(
    url: str, case: Case, clients: int, vocabulary: int
) -> tuple[float, float, list[tuple[float, Row]]]:
    """When the case began, the seconds it took, and its answers; after a round to warm up."""
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as http:
        warm_up = replace(case, requests=clients // case.sharing_degree * case.sharing_degree)
        await run_clients(http, bodies_of(warm_up, vocabulary, seed=1), clients)
        await flush_cache(http)
        bodies = bodies_of(case, vocabulary, seed=0)
        started = time.perf_counter()
        answers = await run_clients(http, bodies, clients)
        return started, time.perf_counter() - started, answers


def bodies_of(case: Case, vocabulary: int, seed: int) -> list[bytes]:
    samplings = [
        {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
        for output in case.outputs()
    ]
    prompts = case.prompts(vocabulary, seed)
    return encoded(
        [
            {"input_ids": prompt, "sampling_params": sampling}
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
    )


async def run_clients(http: Any, bodies: Sequence[bytes], clients: int) -> list[tuple[float, Row]]:
    """Seconds and meta information of every answer to `clients` that ask without a pause."""
    left = iter(bodies)  # one iterator for all of them
    answers: list[tuple[float, Row]] = []

    async def client() -> None:
        for body in left:
            sent = time.perf_counter()
            async with http.post("/generate", data=body, headers=JSON) as response:
                answer = await response.json()
            answers.append((time.perf_counter() - sent, answer["meta_info"]))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def figures(answers: list[tuple[float, Row]], steps: list[Step], seconds: float) -> Row:
    def mean(values: list[int]) -> float:
        return round(sum(values) / max(len(values), 1), 2)

    prefills = [step for step in steps if step.prefill_tokens]
    decodes = [step for step in steps if not step.prefill_tokens]
    latencies = [latency for latency, _ in answers]
    return {
        "requests": len(answers),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(answers) / seconds, 2),
        "prefill_steps": len(prefills),
        "decode_steps": len(decodes),
        "requests_per_prefill_step": mean([step.prefill_requests for step in prefills]),
        "requests_per_decode_step": mean([step.decode_requests for step in decodes]),
        "computed_tokens": sum(a["prompt_tokens"] - a["cached_tokens"] for _, a in answers),
        "latency_p50_seconds": round(float(np.median(latencies)), 3),
        "latency_p99_seconds": round(float(np.quantile(latencies, 0.99)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model folder, instead of a tiny random one")
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 200])
    parser.add_argument("--case", choices=list(CASES), help="what they ask, instead of eights")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    args = parser.parse_args()

    from tiny_model import make_tiny_model

    model = args.model
    flags = list(args.flags)
    if model is None:
        model = make_tiny_model(Path(tempfile.mkdtemp()), [__doc__ or ""], VOCABULARY, 2048)
        flags += ["--dtype", "float32", "--max-total-tokens", "400000"]
    rows = ResultFile(args.out, ("case", "side"))
    for side in args.sides:
        for row in run_side(["--model-path", str(model), *flags], side, args.clients, args.case):
            print(json.dumps(rows.add(row)), flush=True)


if __name__ == "__main__":
    main()
