"""Each side of a benchmark in a process of its own, and what is done in its scheduler's."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

import psutil


def results_of(run: Callable[..., None], *args: Any) -> Generator[Any, None, None]:
    """What `run(*args, pipe)` sends through `pipe`, in a fresh process that is gone at the end.

    Closing the generator ends the process and all that it started. Raises RuntimeError if it fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(*args, sender))
    process.start()
    sender.close()
    try:
        while True:
            try:
                result = receiver.recv()
            except EOFError:
                break
            yield result
        process.join()
    finally:
        if process.is_alive():
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{run.__name__} ended with exit code {process.exitcode}, see above")


def children_named(name: str, pid: int | None = None) -> list[psutil.Process]:
    """What `pid` (or this process) and its children have started and has `name` in its command
    line; one that has ended is none of them, though nobody has waited for it yet."""
    found = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(child.cmdline()):
                    found.append(child)
    except psutil.NoSuchProcess:
        pass
    return found


def engine_of(flags: Sequence[str]) -> Any:
    """SGLang's Engine from a server's flags, with those of --batchllm among them."""
    import sglang
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    return sglang.Engine(server_args=prepare_server_args([*flags]))


def flush(engine: Any) -> None:
    """Empty the cache of an engine once it is idle: answers may arrive while the scheduler still
    has their requests in its hands, and it refuses to flush then. Raises RuntimeError if it never
    is."""
    flushed = engine.loop.run_until_complete(engine.tokenizer_manager.flush_cache(timeout_s=60))
    if not flushed.success:
        raise RuntimeError("the engine is still at work a minute after its last answer")


def in_scheduler(engine_class: Any, prepare: Callable[..., None], *args: Any) -> None:
    """Engines made from `engine_class` from now on call `prepare(*args)` in the scheduler's process
    before it begins, and before what earlier calls have asked for. All must be picklable."""
    inner = engine_class.run_scheduler_process_func
    prepared = functools.partial(_prepared, inner, functools.partial(prepare, *args))
    engine_class.run_scheduler_process_func = staticmethod(prepared)


def stock_scheduler() -> Any:
    """SGLang's own scheduler, though a plugin may have its name by now; what is wrapped in it is
    wrapped on either side."""
    from sglang.srt.managers.scheduler import Scheduler

    return next(kind for kind in Scheduler.__mro__ if kind.__module__.startswith("sglang.srt."))


def _prepared(
    inner: Callable[..., None], prepare: Callable[[], None], *args: Any, **kwargs: Any
) -> None:
    prepare()
    inner(*args, **kwargs)
