"""A server process for tests, and the sizes that tests rely on."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from processes import flush as flush_engine
from processes import in_scheduler, stock_scheduler
from sglang_batchllm.client.get_report import get_report

API_KEY = "test-key"
VOCAB_SIZE = 512
CONTEXT_LENGTH = 2048
AMPLE = 20_000
MIXING = 1_200  # for a third of a batch of 150
SCARCE = 400
SERVER_PAGE_SIZE = 16


def record_last_layer(engine_class: Any, path: Path) -> None:
    """Engines made from `engine_class` from now on write to `path`, a line per forward step, how
    many rows reach the MLP of the model's last layer."""
    in_scheduler(engine_class, _record_last_layer, path)


def _record_last_layer(path: Path) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    prepare = Scheduler.init_schedule_policy
    file = path.open("w", buffering=1)

    def record(self: Any) -> None:
        prepare(self)
        mlp = self.tp_worker.model_runner.model.model.layers[-1].mlp
        mlp.register_forward_pre_hook(lambda _, args: print(args[0].shape[0], file=file))

    Scheduler.init_schedule_policy = record


def keep_no_rows(engine_class: Any) -> None:
    """Engines made from `engine_class` from now on have no memory for logprobs of shared tokens."""
    in_scheduler(engine_class, _keep_no_rows)


def _keep_no_rows() -> None:
    from sglang_batchllm.policy.rows import RowMemory

    RowMemory.__init__.__defaults__ = (0,)


ABORTED_IN_PREFILL = {"custom_params": {"abort_in_prefill": True}}
"""Among a request's sampling parameters: abort it as soon as a part of its prompt is computed."""


def abort_in_prefill(engine_class: Any, path: Path) -> None:
    """In engines made from `engine_class` from now on, requests of ABORTED_IN_PREFILL are aborted
    when they are caught half-way; their ids go to `path`, a line for each, with the tokens that
    were computed of their prompts."""
    in_scheduler(engine_class, _abort_in_prefill, path)


def _abort_in_prefill(path: Path) -> None:
    from sglang.srt.managers.io_struct import AbortReq

    from sglang_batchllm.edge import seams

    step_of = seams.load("scheduler").step_of
    scheduler = stock_scheduler()
    choose = scheduler.get_next_batch_to_run
    file = path.open("w", buffering=1)

    def abort_and_choose(self: Any, *args: Any, **kwargs: Any) -> Any:
        others = getattr(self.tree_cache, "in_chunks", ())
        for req in (self.chunked_req, *others):
            marks = (req and req.sampling_params.custom_params) or {}
            if marks.pop("abort_in_prefill", False):
                print(req.rid, step_of(req)[1], file=file)
                self.abort_request(AbortReq(rid=req.rid))
        return choose(self, *args, **kwargs)

    scheduler.get_next_batch_to_run = abort_and_choose


class Server:
    """A server process and the requests that tests send to it."""

    LAUNCH = (sys.executable, "-m", "sglang.launch_server")
    SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")

    def __init__(self, model: Path, *flags: str, command: Sequence[str] = LAUNCH):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *command,
            *("--model-path", str(model), "--dtype", "float32"),
            *("--port", str(port), "--log-level", "warning"),
            "--sleep-on-idle",
            "--api-key",
            API_KEY,
            "--max-total-tokens",
            str(AMPLE),
            *flags,
        ]
        self.process = subprocess.Popen(command)
        self._headers = {"Authorization": f"Bearer {API_KEY}"}

    def wait(self, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended during start-up"
            try:
                if requests.get(self.url + "/health_generate", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise TimeoutError("the server did not start")

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, headers=self._headers, timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        options.setdefault("timeout", 120)
        return requests.post(self.url + path, json=body, headers=self._headers, **options)

    def stop(self) -> None:
        from sglang.srt.utils import kill_process_tree

        kill_process_tree(self.process.pid, wait_timeout=30)


def flush(source: Any) -> None:
    """Empty the cache of an engine or a `Server`, once it is idle."""
    if isinstance(source, Server):
        source.post("/flush_cache?timeout=60", {}).raise_for_status()
    else:
        flush_engine(source)


def wait_until_whole(source: Any, api_key: str | None = None, seconds: float = 30) -> dict:
    """The report, once every KV slot is free again."""
    deadline = time.monotonic() + seconds
    while True:
        report = get_report(source, api_key)
        kv = report["kv_tokens"]
        if not report["running"] and kv["free"] + kv["evictable"] == kv["total"]:
            assert kv["pinned"] == kv["held"] == 0
            return report
        assert time.monotonic() < deadline, f"KV still held: {kv}"
        time.sleep(0.1)
