"""Traces of many programs, in order, made several at a time where one takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor

from sglang_batchllm.client.tracing import Trace

SLOW_SECONDS = 0.002
"""A program that takes longer before its first answer is worth a thread. Most take 40 µs, and
threads would only take turns with them."""


class Traces:
    """The traces of `programs`, in that order; to be iterated once.

    The thread that iterates makes them. While they take long, up to `helpers` threads of the pool
    make the next ones: one trace each, and then a helper queues again behind all else that the
    pool has to run. At most 2 * helpers traces are held.
    """

    def __init__(
        self, trace: Callable[[int], Trace], programs: range, pool: Executor, helpers: int
    ):
        """trace: of the program with this index; raises nothing."""
        self._trace = trace
        self._programs = programs
        self._pool = pool
        self._helpers = helpers
        self._changed = threading.Condition()
        self._made: dict[int, Trace] = {}
        self._turn = programs.start  # whose trace is needed next
        self._untaken = programs.start  # the first that no thread has begun
        self._helping = 0

    def __iter__(self) -> Generator[tuple[int, Trace], None, None]:
        try:
            for index in self._programs:
                self._turn = index
                while (trace := self._made.pop(index, None)) is None:
                    if self._trace_next() is None:
                        with self._changed:
                            self._changed.wait_for(lambda i=index: i in self._made)
                yield index, trace
        finally:
            with self._changed:
                self._untaken = self._programs.stop

    def _trace_next(self) -> float | None:
        """Seconds that it took; None if there is nothing to trace now."""
        with self._changed:
            index = self._untaken
            if index >= min(self._programs.stop, self._turn + 2 * self._helpers):
                return None
            self._untaken += 1
        started = time.monotonic()
        trace = self._trace(index)
        seconds = time.monotonic() - started
        with self._changed:
            self._made[index] = trace
            self._changed.notify()
            missing = 0
            if seconds > SLOW_SECONDS:
                missing = min(self._helpers - self._helping, self._programs.stop - self._untaken)
                self._helping += missing
        for _ in range(missing):
            self._pool.submit(self._help)
        return seconds

    def _help(self) -> None:
        """In a thread of the pool."""
        seconds = self._trace_next()
        if seconds is not None and seconds > SLOW_SECONDS:
            self._pool.submit(self._help)
        else:
            with self._changed:
                self._helping -= 1
