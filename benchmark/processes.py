"""Each side of a benchmark in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any


def results_of(run: Callable[..., None], *args: Any) -> Iterator[Any]:
    """What `run(*args, pipe)` sends through `pipe`, in a fresh process that is gone at the end."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(*args, sender))
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()
