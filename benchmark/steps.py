"""What a scheduler does step by step, recorded in its own process for either side.

`record_steps(engine_class, path)` makes the engines of that class write one JSON line per
forward step. The same wrapper serves stock SGLang and ours, and touches nothing but the time it
takes to write a line (some 0.1 ms per thousand requests).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import in_scheduler, stock_scheduler


@dataclass(frozen=True)
class Step:
    """One forward step.

    start: seconds, when it was launched. prefill_tokens, prefill_requests: what it prefills.
    attended: (query, key) pairs of its prefill attention. decode_requests: rows that decode.
    context: KV tokens that these rows read, a shared prefix once per row. kv_used: slots in use
    after its allocation, cached ones that nobody holds left out. waiting: requests not running.
    schedule_ms, launch_ms: host time to choose and prepare the batch, and to launch it.
    """

    start: float
    prefill_tokens: int
    prefill_requests: int
    attended: int
    decode_requests: int
    context: int
    kv_used: int
    waiting: int
    schedule_ms: float
    launch_ms: float


def record_steps(engine_class: Any, path: Path) -> None:
    """Engines made from `engine_class` from now on append their steps to the file `path`."""
    in_scheduler(engine_class, _record, path)


def read_steps(path: Path) -> list[Step]:
    return [Step(**json.loads(line)) for line in path.read_text().splitlines()]


def _record(path: Path) -> None:
    from sglang_batchllm.edge import seams

    seam = seams.load("scheduler")
    stock = stock_scheduler()
    choose, launch = stock.get_next_batch_to_run, stock.run_batch
    file = path.open("a", buffering=1)  # a line is there before its step's answers are
    schedule_ms = 0.0

    def timed_choose(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal schedule_ms
        started = time.perf_counter()
        plan = choose(self, *args, **kwargs)
        schedule_ms = (time.perf_counter() - started) * 1000
        return plan

    def recorded_launch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = launch(self, batch, *args, **kwargs)
        launch_ms = (time.perf_counter() - started) * 1000
        decoding = batch.reqs
        prefilling: list[Any] = []
        if batch.forward_mode.is_extend():  # a mixed batch has its decoding rows last
            count = len(batch.reqs) - len(batch.decoding_reqs or ())
            prefilling, decoding = batch.reqs[:count], batch.reqs[count:]
        ranges = [seam.step_of(req) for req in prefilling]
        allocator = self.token_to_kv_pool_allocator
        free = allocator.available_size() + self.tree_cache.evictable_size()
        step = Step(
            start=started,
            prefill_tokens=sum(end - start for start, end in ranges),
            prefill_requests=len(prefilling),
            attended=sum((end - start) * (end + start) // 2 for start, end in ranges),
            decode_requests=len(decoding),
            context=sum(len(req.origin_input_ids) + len(req.output_ids) for req in decoding),
            kv_used=self.max_total_num_tokens - free,
            waiting=len(self.waiting_queue),
            schedule_ms=schedule_ms,
            launch_ms=launch_ms,
        )
        file.write(json.dumps(asdict(step)) + "\n")
        return result

    stock.get_next_batch_to_run = timed_choose
    stock.run_batch = recorded_launch
