"""Time to the first token of interactive chat requests beside a batch that runs.

    python benchmark/bench_interactive.py --seconds 15       a tiny model, on any machine
    python benchmark/bench_interactive.py --model llama-8b --out FILE

The batch has the shape of M1 and more requests than the window has time for. With --batchllm it is
one batch of the server's own Batch API; stock SGLang gets the same bodies as plain chat requests,
all of them at once, or so many at a time as `--at-once` says. A few seconds after the first of them
is answered the window opens: each second one streaming chat request comes, of about 100 tokens
that nothing else shares and 16 of output, however long those before it take; the window closes
early where the batch ends. Before the batch, some come one after the other, for reference. Each
side runs on a server of its own, after a warm-up, and the server is killed after the window.
`--model` and `--url` are as for bench_batch_rate.py; what follows a `--` goes to the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from batches import CASES, Case
from results_file import ResultFile, Row
from running_batches import POLL_SECONDS, ApiBatch, Batch, ChatBatch, Watch
from servers import CHAT, ask_all, encoded, session, starting
from texts import Body, chat_bodies, make_prompts, model_and_flags, shrunk

SIDES = ("batchllm", "stock")
IDLE_REQUESTS = 10
WARM_UP_REQUESTS = 96
LEAD_SECONDS = 3.0
"""From the batch's first answer to the window."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server. batch: the case of its requests. interactive: how many."""

    model: Path
    case: Case
    num_interactive: int

    @cached_property
    def batch(self) -> list[Body]:
        return self._bodies(self.case, seed=0)

    @cached_property
    def warm_up(self) -> list[Body]:
        return self._bodies(replace(self.case, requests=WARM_UP_REQUESTS), seed=1)

    @cached_property
    def interactive(self) -> list[Body]:
        return self._bodies(Case("interactive", self.num_interactive, 1, 80, 20, 16), seed=2)

    def _bodies(self, case: Case, seed: int) -> list[Body]:
        return chat_bodies(make_prompts(case, self.model, seed), case.output)


# Interactive requests


@dataclass
class Stream:
    """A request whose answer comes token by token. sent: when. first, last: seconds from then to
    these tokens, None while they have not come. error: why they never will."""

    sent: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    error: str | None = None

    async def run(self, http: aiohttp.ClientSession, body: Body) -> None:
        try:
            usage = await self._read(http, body)
        except (aiohttp.ClientError, RuntimeError) as error:
            self.error = f"{type(error).__name__}: {error}"
            return
        self.last = time.perf_counter() - self.sent
        if usage.get("completion_tokens") != body["max_tokens"]:
            self.error = f"its tokens are {usage}, not {body['max_tokens']}"

    async def _read(self, http: aiohttp.ClientSession, body: Body) -> dict[str, Any]:
        """SGLang sends the first event with the first token, whose text may be empty."""
        usage: dict[str, Any] = {}
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with http.post(CHAT, json=asked) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise RuntimeError(f"the stream broke off: {event}")
                    self.first = self.first or time.perf_counter() - self.sent
                    usage = event.get("usage") or usage
        return usage


async def stream_each_second(
    http: aiohttp.ClientSession, bodies: Sequence[Body], goes_on: Callable[[], bool]
) -> tuple[list[Stream], list[asyncio.Task[None]]]:
    """While it goes on."""
    started = time.perf_counter()
    streams: list[Stream] = []
    tasks: list[asyncio.Task[None]] = []
    for number, body in enumerate(bodies, 1):
        streams.append(Stream())
        tasks.append(asyncio.create_task(streams[-1].run(http, body)))
        await asyncio.sleep(started + number - time.perf_counter())
        if not goes_on():
            break
    return streams, tasks


def figures(streams: Sequence[Stream], ended: float) -> Row:
    """Quantiles of the time to the first token. Where that has not come when it ended, its time is
    as long as it was waited for, so that the true quantile is that at least."""
    firsts = [ended - one.sent if one.first is None else one.first for one in streams]
    lasts = [one.last for one in streams if one.last is not None]
    errors = [one.error for one in streams if one.error is not None]
    return {
        "interactive_requests": len(streams),
        "unanswered": sum(one.first is None for one in streams),
        "failed": len(errors),
        "first_error": errors[0] if errors else None,
        "first_token_p50_seconds": round(float(np.quantile(firsts, 0.5)), 4),
        "first_token_p90_seconds": round(float(np.quantile(firsts, 0.9)), 4),
        "first_token_worst_seconds": round(max(firsts), 4),
        "last_token_p50_seconds": round(float(np.median(lasts)), 4) if lasts else None,
        "last_token_worst_seconds": round(max(lasts), 4) if lasts else None,
        "first_token_seconds": [round(first, 4) for first in firsts],
    }


# Sides


async def idle(http: aiohttp.ClientSession, load: Load) -> Row:
    streams: list[Stream] = []
    for body in load.interactive[:IDLE_REQUESTS]:
        streams.append(Stream())
        await streams[-1].run(http, body)
    return {"load": "idle", **figures(streams, time.perf_counter())}


async def beside_batch(
    http: aiohttp.ClientSession, load: Load, batch: Batch, args: argparse.Namespace
) -> Row:
    total = load.case.requests
    watch, created = Watch(batch), time.perf_counter()
    while not watch.done and time.perf_counter() - created < args.latest:
        await asyncio.sleep(POLL_SECONDS)
        watch.check()
    first = time.perf_counter() - created
    await asyncio.sleep(LEAD_SECONDS)

    done, opened = watch.done, time.perf_counter()
    print(f"window opens with {done} of {total} of the batch done", flush=True)
    bodies = load.interactive[IDLE_REQUESTS:]
    streams, tasks = await stream_each_second(http, bodies, lambda: watch.done < total)
    watch.check()
    done_then, seconds = watch.done, time.perf_counter() - opened
    print(f"window closes after {seconds:.0f} s with {done_then} of {total} done", flush=True)
    _, late = await asyncio.wait(tasks, timeout=args.patience)
    ended, aborted = time.perf_counter(), await batch.aborted()
    for task in {*late, watch.task}:
        task.cancel()
    return {
        "load": "batch",
        **figures(streams, ended),
        "window_seconds": round(seconds, 2),
        "batch_first_answer_seconds": round(first, 2),
        "batch_requests": total,
        "batch_done_at_start": done,
        "batch_done_at_end": done_then,
        "batch_ran_throughout": 0 < done <= done_then < total and len(streams) == len(bodies),
        "batch_aborted_requests": aborted,
        "batch_output_tokens_per_second": round((done_then - done) * load.case.output / seconds, 1),
    }


async def measure(url: str, side: str, load: Load, args: argparse.Namespace) -> list[Row]:
    async with session(url) as http:
        await ask_all(http, encoded(load.warm_up))
        rows = [await idle(http, load)]
        if side == "batchllm":
            batch: Batch = await ApiBatch.create(http, load.batch)
        else:
            batch = ChatBatch(http, load.batch, args.at_once or len(load.batch))
        try:
            rows.append(await beside_batch(http, load, batch, args))
        finally:
            await batch.leave()
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a folder with a config.json")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--requests", type=int, default=8000, help="of the batch")
    parser.add_argument("--seconds", type=int, default=60, help="of the window")
    parser.add_argument("--at-once", type=int, help="requests of the batch at a time, on stock")
    parser.add_argument(
        "--latest", type=float, default=60, help="seconds to wait for the batch's first answer"
    )
    parser.add_argument(
        "--patience", type=float, default=10, help="seconds to wait for answers after the window"
    )
    parser.add_argument("--url", help="a server that runs already, for the one of --sides")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("flags", nargs="*", metavar="FLAG")
    args = parser.parse_args()
    if args.url and len(args.sides) != 1:
        parser.error("--url is for one side: name it with --sides")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers end, too

    shape = CASES["M1"] if args.model else shrunk(CASES["M1"])
    requests = args.requests // shape.sharing_degree * shape.sharing_degree
    case = replace(shape, name=f"{shape.name}, {requests} requests", requests=requests)
    file = ResultFile(args.out, ("case", "side", "load"))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, flags = model_and_flags(args.model, folder / "model")
        load = Load(model, case, IDLE_REQUESTS + args.seconds)
        for side in args.sides:
            ours = ["--batchllm", "--batchllm-files", str(folder / "files")]
            own = [*flags, *args.flags, *(ours if side == "batchllm" else [])]
            with starting(own, f"interactive-{side}", args.url) as server:
                _ = load.batch, load.warm_up, load.interactive  # are made while it starts
                server.wait_until_ready()
                measured = asyncio.run(measure(server.url, side, load, args))
            if side == "stock" and args.at_once is not None:
                side = f"stock, {args.at_once} at once"
            for row in measured:
                rows.append(file.add({"case": case.name, "side": side, **row}))
                print(json.dumps(rows[-1]), flush=True)
    print_table(rows)


def print_table(rows: Sequence[Row]) -> None:
    """Milliseconds to the first token, the batch's requests at both ends of the window, and its
    output tokens per second in it."""
    titles = ["requests", "unanswered", "median", "p90", "worst", "done from", "to", "tokens/s"]
    print(f"{'side':<24}{'load':<8}" + "".join(f"{title:>12}" for title in titles))
    for row in rows:
        cells = [row["interactive_requests"], row["unanswered"]]
        cells += [
            f"{1000 * row[f'first_token_{quantile}_seconds']:,.0f}"
            for quantile in ("p50", "p90", "worst")
        ]
        for key in ("batch_done_at_start", "batch_done_at_end", "batch_output_tokens_per_second"):
            cells.append(row.get(key, ""))
        print(f"{row['side']:<24}{row['load']:<8}" + "".join(f"{cell:>12}" for cell in cells))
        if not row.get("batch_ran_throughout", True):
            print("  the batch did not run throughout the window: try more --requests or --latest")
        if row.get("batch_aborted_requests"):
            print(
                f"  {row['batch_aborted_requests']} requests of the batch were aborted in between"
            )
        if row["failed"]:
            print(f"  {row['failed']} interactive requests failed, the first: {row['first_error']}")


if __name__ == "__main__":
    main()
