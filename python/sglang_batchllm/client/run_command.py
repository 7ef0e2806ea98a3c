"""``batchllm run``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sglang_batchllm.client.sources import check_writable, open_source
from sglang_batchllm.jobs.display import display_for, print_summary, summary_of
from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.hosts import Engine, Host, Running
from sglang_batchllm.jobs.job import Files, Job
from sglang_batchllm.jobs.model import model_identity
from sglang_batchllm.jobs.reading import Reading
from sglang_batchllm.jobs.rows import Rules
from sglang_batchllm.jobs.server import Server
from sglang_batchllm.jobs.status import Status
from sglang_batchllm.jobs.table import check_output, write_answers

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def run_files(
    console: Console,
    flags: Sequence[str],
    *,
    inputs: Sequence[str],
    output: str,
    errors: Path | None,
    model: str | None,
    url: str | None,
    api_key: str | None,
    params: str,
    tokenizer: str | None,
    report: Path | None,
    **prompts: Any,
) -> None:
    """flags: for the engine's server. prompts: for `sources.open_source`. The others are those of
    the command. Raises JobError, and exits with `INTERRUPTED` when it was stopped."""
    if (model is None) == (url is None):
        raise JobError("give either --model, to start an engine, or --url of a server that runs")
    if url is not None and flags:
        raise JobError(f"{flags[0]} is for an engine that is started; leave it out with --url")
    rules = Rules(params=_params(params))
    for path in (errors, report):
        if path is not None:
            check_writable(path)
    with _target(output) as (target, after):
        source = open_source(inputs, target, **prompts)
        records = source.records(target)
        if source.table is not None:
            if errors is not None:
                raise JobError("--errors is for batch files; a table has a column for them")
            check_output(source.table, target)
        host: Host
        if model is None:
            assert url is not None
            key = api_key or os.environ.get("OPENAI_API_KEY")
            host, identity = Running(Server(url, key)), None
        else:
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
            command += ["--batchllm", *flags]
            if api_key is not None:
                command += ["--api-key", api_key]
            log = target.with_name(target.name + ".engine.log")
            check_writable(log)
            host = Engine(command, log, api_key)
            identity = model_identity(model)
            rules = replace(rules, models=[_value(flags, "--served-model-name") or model])
            tokenizer = tokenizer or _value(flags, "--tokenizer-path") or model
        reading = Reading(rules, tokenizer, "--trust-remote-code" in flags)
        display = display_for(console)
        job = Job(Files(source.inputs, records, errors), host, reading, identity, display.show)
        try:
            _run(console, job, host, output)
        finally:
            display.close()
        if source.table is not None:
            write_answers(source.table, records, target)
        after()
    print_summary(console, job.status, output)
    if report is not None:
        about = {"model": job.model, "inputs": [*inputs], "output": output}
        report.write_text(json.dumps({**about, **summary_of(job.status)}, indent=1) + "\n")


def _run(console: Console, job: Job, host: Host, output: str) -> Status:
    """Ctrl-C stops it within seconds; again, at once."""

    async def run() -> Status:
        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(job.run())
        stopped = False

        def stop() -> None:
            nonlocal stopped
            if stopped:
                console.show_cursor()
                if isinstance(host, Engine):
                    host.kill()
                os._exit(INTERRUPTED)
            stopped = True
            console.print("stopping; once more stops at once", highlight=False)
            running.cancel()

        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, stop)
        return await running

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        console.show_cursor()
        ended, total = job.status.ended, job.status.total
        console.print(
            f"stopped: {ended:,} of {total or 'all'} requests have a record in "
            f"{job.files.output}; the same command goes on from there"
            if output != "-"
            else "stopped: standard output gets nothing of a run that does not end",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # a thread may still be reading


@contextmanager
def _target(output: str) -> Iterator[tuple[Path, Any]]:
    """Where the output is written, and what is to be done with it then."""
    if output != "-":
        path = Path(output)
        check_writable(path)
        yield path, lambda: None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"

        def show() -> None:
            with path.open("rb") as records:
                shutil.copyfileobj(records, sys.stdout.buffer)
            sys.stdout.flush()

        yield path, show


def _params(text: str) -> dict[str, Any]:
    try:
        params = json.loads(text)
    except ValueError as error:
        raise JobError(f"--params is not JSON: {error}") from None
    if not isinstance(params, dict):
        raise JobError("--params must be an object of JSON, such as '{\"max_tokens\": 16}'")
    return params


def _value(flags: Sequence[str], name: str) -> str | None:
    """What is given to a flag of the server's, as argparse takes it."""
    found = None
    for place, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        if flag == name:
            found = value if equals else next(iter(flags[place + 1 : place + 2]), None)
    return found
