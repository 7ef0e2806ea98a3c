"""Host time per request, by stage, of a list with short answers: stock SGLang and --batchllm.

    python benchmark/bench_host.py --out FILE                    a tiny model, on any machine
    python benchmark/bench_host.py --model PATH --out FILE --options '{"load_format": "dummy"}'

The same wrappers stand around the same methods of SGLang on both sides, in the front process and in
the scheduler's, and count the time between their begin and end without that of the wrappers within
them. Waiting for the GPU is counted by itself. Each side runs in a process of its own, each case
after a warm-up with other tokens.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batches import CASES
from bench_offline import ENGINE_OPTIONS
from processes import flush, in_scheduler, results_of, stock_scheduler
from results_file import ResultFile, Row

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

SIDES: dict[str, dict[str, Any]] = {"batchllm": {"batchllm": True}, "stock": {}}
WARM_UP = 2
"""One part of so many of a case goes ahead with other tokens, so that nothing is compiled later."""

FRONT = {
    "_batch_tokenize_and_process": "prepare",
    "_tokenize_one_request": "prepare",
    "_send_batch_request": "send",
    "_send_one_request": "send",
    "_handle_batch_output": "answer",
}
SCHEDULER = {
    "process_input_requests": "intake",
    "get_next_batch_to_run": "choose",
    "run_batch": "launch",
    "process_batch_result": "result",
}
"""Stages of methods."""


class Stages:
    """Seconds in each stage of a process, and when the first forward step began."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.first_step: float | None = None
        self._open: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, name: str) -> Any:
        self._pass_to(name)
        try:
            yield
        finally:
            stage, since = self._open.pop()
            now = time.perf_counter()
            self.seconds[stage] += now - since
            if self._open:
                self._open[-1] = self._open[-1][0], now

    def _pass_to(self, name: str) -> None:
        now = time.perf_counter()
        if self._open:
            outer, since = self._open[-1]
            self.seconds[outer] += now - since
        self._open.append((name, now))

    def around(self, owner: Any, method: str, name: str) -> None:
        """Count a method's time from now on, and of a coroutine that until it ends, with what else
        its event loop does meanwhile but for other methods that are counted."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                if name == "forward" and self.first_step is None:
                    self.first_step = time.perf_counter()
                return inner(*args, **kwargs)

        async def timed_coroutine(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return await inner(*args, **kwargs)

        suspends = inspect.iscoroutinefunction(inner)
        setattr(owner, method, timed_coroutine if suspends else timed)


def _time_scheduler(path: Path) -> None:
    """In the scheduler's process: write the stages whenever the cache is flushed."""
    import torch
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
    from sglang.srt.managers.tp_worker import TpModelWorker

    stages = Stages()
    scheduler = stock_scheduler()
    for method, name in SCHEDULER.items():
        stages.around(scheduler, method, name)
    stages.around(SchedulerRequestReceiver, "recv_requests", "receive")
    stages.around(TpModelWorker, "forward_batch_generation", "forward")
    stages.around(torch.cuda.Event, "synchronize", "wait")
    flush = scheduler.flush_cache

    def flush_and_write(self: Any, *args: Any, **kwargs: Any) -> Any:
        path.write_text(json.dumps({"first_step": stages.first_step, **stages.seconds}))
        stages.seconds.clear()
        stages.first_step = None
        return flush(self, *args, **kwargs)

    scheduler.flush_cache = flush_and_write


def run_side(
    options: dict[str, Any], cases: Sequence[str], orders: Sequence[str], side: str, pipe: Any
) -> None:
    """Start an engine, run `cases`, send one result per run through `pipe`."""
    from sglang.srt.entrypoints.engine import Engine

    path = Path(tempfile.mkdtemp()) / "stages"
    in_scheduler(Engine, _time_scheduler, path)
    engine = Engine(**options, **SIDES[side])
    try:
        manager = engine.tokenizer_manager
        vocab_size = manager.model_config.vocab_size
        front = Stages()
        for method, name in FRONT.items():
            front.around(manager, method, name)
        for name in cases:
            case = CASES[name]
            sampling = {"temperature": 0, "max_new_tokens": case.output, "ignore_eos": True}
            warm_up = case.prompts(vocab_size, seed=1)[: case.requests // WARM_UP]
            engine.generate(input_ids=warm_up, sampling_params=sampling)
            for order in orders if side == "stock" else ["shuffled"]:
                prompts = case.prompts(vocab_size)
                if order == "grouped":
                    prompts.sort()
                flush(engine)
                front.seconds.clear()
                started = time.perf_counter()
                results = engine.generate(input_ids=prompts, sampling_params=sampling)
                seconds = time.perf_counter() - started
                engine.flush_cache()  # whether or not it is idle, for `flush_and_write`
                stages = json.loads(path.read_text())
                first_step = stages.pop("first_step") - started
                infos = [result["meta_info"] for result in results]
                tokens = sum(map(len, prompts))
                pipe.send(
                    {
                        "case": name,
                        "side": side,
                        "order": order,
                        "seconds": seconds,
                        "requests_per_second": len(prompts) / seconds,
                        "first_step_seconds": first_step,
                        "computed_tokens": tokens - sum(info["cached_tokens"] for info in infos),
                        "distinct_tokens": case.distinct_tokens,
                        "microseconds_per_request": {
                            stage: round(value / len(prompts) * 1e6, 1)
                            for stage, value in {**front.seconds, **stages}.items()
                        },
                    }
                )
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="model folder; a tiny one is made if none is given")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["classify", "label"])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument(
        "--orders",
        nargs="+",
        choices=["shuffled", "grouped"],
        default=["shuffled", "grouped"],
        help="of stock's prompts; ours are shuffled",
    )
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="more engine arguments for every side (JSON)"
    )
    args = parser.parse_args()
    options = {**ENGINE_OPTIONS, **args.options}
    if args.model is None:
        from tiny_model import make_tiny_model

        args.model = str(Path(tempfile.mkdtemp()) / "model")
        make_tiny_model(Path(args.model), [__doc__ or ""], 2048, 4096)
        options |= {"dtype": "float32", "max_total_tokens": 200_000, "chunked_prefill_size": 8192}
    options["model_path"] = args.model
    file = ResultFile(args.out, ("case", "side", "order"))
    best: dict[tuple[str, str], Row] = {}
    for side in args.sides:
        for result in results_of(run_side, options, args.cases, args.orders, side):
            print(json.dumps(file.add({**result, "engine_options": args.options})), flush=True)
            key = result["case"], side
            if key not in best or best[key]["seconds"] > result["seconds"]:
                best[key] = result
    for case in args.cases:
        for side in args.sides:
            row = best[case, side]
            stages = "  ".join(f"{k} {v:.0f}" for k, v in row["microseconds_per_request"].items())
            print(
                f"{case} {side} ({row['order']}): {row['requests_per_second']:.1f} requests/s, "
                f"first step after {row['first_step_seconds'] * 1000:.0f} ms; µs/request: {stages}"
            )


if __name__ == "__main__":
    main()
