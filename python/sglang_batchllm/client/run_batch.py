"""`run_batch` that hands the runtime the whole batch before it starts."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from sglang.lang import interpreter
from sglang.lang.interpreter import ProgramState
from sglang.lang.ir import SglFunction, SglSamplingParams

from sglang_batchllm.client.channel import Channel, find_channel
from sglang_batchllm.client.direct import run_directly
from sglang_batchllm.client.exchange import listening
from sglang_batchllm.client.progress import show_progress
from sglang_batchllm.client.replay import Replay, Strays, strays
from sglang_batchllm.client.room import HandedOver, Room
from sglang_batchllm.client.traces import Traces
from sglang_batchllm.client.tracing import Trace, trace_program
from sglang_batchllm.wire.lines import Reply, request_line
from sglang_batchllm.wire.request_ids import new_batch_id

logger = logging.getLogger(__name__)

MAX_THREADS = 512
"""Programs in flight at most when `num_threads` is left to us. Only a program whose first answers
are there takes a thread, so this bounds those that are in a later turn."""


def run_batch(
    stock: Callable[..., Any],
    program: SglFunction,
    backend: Any,
    batch_arguments: Sequence[dict[str, Any]],
    default_sampling_para: SglSamplingParams,
    num_threads: int | str,
    progress_bar: bool,
    generator_style: bool = False,
) -> list[ProgramState] | Iterator[ProgramState]:
    """Wraps SGLang's `run_program_batch`, which it leaves alone for a backend without
    ``--batchllm``, where it would run one program after the other anyway, and for a program whose
    runs have strayed from their traces."""
    backend = getattr(backend, "endpoint", backend)
    channel = None
    if num_threads != 1 and len(batch_arguments) > 1 and not strays(program):
        channel = find_channel(backend)
    if channel is None:
        return stock(
            program,
            backend,
            batch_arguments,
            default_sampling_para,
            num_threads,
            progress_bar,
            generator_style=generator_style,
        )
    if num_threads == "auto":
        at_least = max(96, multiprocessing.cpu_count() * 16)  # SGLang's own number
        num_threads = max(at_least, min(channel.max_running_requests, MAX_THREADS))
    batch = _Batch(
        program, channel, batch_arguments, default_sampling_para, int(num_threads), progress_bar
    )
    states = batch.run(stop_early=generator_style)
    return states if generator_style else list(states)


WHOLE = 4096
"""Programs that are always handed over as one list."""

FIRST_PART = 256
"""Of more, the first go ahead in a list of their own, which the server runs while the others are
traced, sent and tokenized. Their KV stays cached for the others."""


class _Start:
    """A program whose first requests were handed over, until all of their answers are there.

    batch: the id of the hand-over. more: whether the server expects more requests of it.
    """

    __slots__ = ("answers", "batch", "index", "missing", "more", "trace")

    def __init__(self, index: int, trace: Trace, batch: str, more: bool):
        self.index = index
        self.trace = trace
        self.batch = batch
        self.more = more
        self.missing = len(trace.requests)
        self.answers: list[Reply | None] = [None] * self.missing


class _Batch:
    """One call of `run_batch`.

    A feeder thread traces the programs, with the pool's help where that takes long, hands their
    first requests over and reads the answers.
    A program is run, by SGLang and on a thread of the pool, once all its first answers are there,
    and so in about the order of the server's plan; one that could not be traced is run when no
    other is ready.
    """

    def __init__(
        self,
        program: SglFunction,
        channel: Channel,
        arguments: Sequence[dict[str, Any]],
        sampling: SglSamplingParams,
        num_threads: int,
        progress_bar: bool,
    ):
        self._program = program
        self._channel = channel
        self._arguments = arguments
        self._sampling = sampling
        self._num_threads = min(num_threads, len(arguments))
        self._pool = ThreadPoolExecutor(self._num_threads)
        self._ready: deque[_Start] = deque()
        self._untraced: deque[int] = deque()
        self._started = bytearray(len(arguments))  # flags
        self._stopped = False
        self._strays = Strays(program)
        # Programs of which the server has yet to be told, and whether they went on.
        self._ended: deque[tuple[_Start, bool]] = deque()
        self._telling = threading.Lock()
        self._untold = False
        self._changed = threading.Condition()
        self._room = Room()
        self._unfinished = len(arguments)
        self._results: list[ProgramState | BaseException | None] = [None] * len(arguments)
        self._bar = show_progress(len(arguments)) if progress_bar else None

    def run(self, stop_early: bool) -> Iterator[ProgramState]:
        """Yield the states in the order of the arguments, and raise what a program raised.

        stop_early: yield what is there and stop at the first exception, instead of letting all
            programs finish before.
        """
        feeder = threading.Thread(target=self._feed, args=(self._parts(),), daemon=True)
        feeder.start()
        try:
            for index in range(len(self._arguments)):
                with self._changed:
                    while self._results[index] is None or (self._unfinished and not stop_early):
                        self._changed.wait()
                result, self._results[index] = self._results[index], None
                if isinstance(result, BaseException):
                    raise result
                assert result is not None
                yield result
        finally:
            self._stopped = True
            feeder.join()
            self._pool.shutdown(cancel_futures=True)
            if self._bar is not None:
                self._bar.close()

    def _parts(self) -> list[range]:
        """The programs to hand over together, as far as there is room for them."""
        number = len(self._arguments)
        first = number if number <= WHOLE else FIRST_PART
        return [part for part in (range(first), range(first, number)) if part]

    # In feeder threads

    def _feed(self, parts: list[range]) -> None:
        """Hand the first of `parts` over; a thread of its own does the same for the next, once the
        server has this one. If there is no room for all of it, the rest follows when it has
        ended."""
        if not parts:
            return
        part = HandedOver(parts[0], self._room)
        others: threading.Thread | None = None
        sent: list[tuple[_Start, int] | None] = []  # program and place in its trace
        batch = new_batch_id()
        try:
            with (
                closing(
                    iter(Traces(self._trace, part.programs, self._pool, self._num_threads))
                ) as traces,
                closing(
                    self._channel.hand_over(batch, self._lines(traces, batch, part, sent))
                ) as answers,
            ):
                for answer in answers:
                    if self._leaves or not self._unfinished:
                        break
                    if answer is not None:
                        self._deliver(sent, *answer)
                    elif others is None and not part.left:
                        others = threading.Thread(target=self._feed, args=(parts[1:],), daemon=True)
                        others.start()
                else:
                    if not all(self._started[index] for index in part.programs):
                        raise ConnectionError("the server ended a hand-over without all answers")
        except Exception as error:
            if not self._leaves:
                logger.warning("The rest of the batch runs as it comes: %r", error)
        part.end()
        for index in part.programs:
            if not self._started[index]:
                self._start(index, None)
        if others is not None:
            others.join()
        else:
            self._feed([part.left, *parts[1:]] if part.left else parts[1:])

    @property
    def _leaves(self) -> bool:
        """Whether nothing more is to be handed over, nor what was to be answered."""
        return self._stopped or self._strays.many

    def _trace(self, index: int) -> Trace:
        return trace_program(
            self._program, self._channel.endpoint, self._arguments[index], self._sampling
        )

    def _lines(
        self,
        traces: Iterator[tuple[int, Trace]],
        batch: str,
        part: HandedOver,
        sent: list[tuple[_Start, int] | None],
    ) -> Iterator[bytes]:
        """The body of a hand-over."""
        keep = part.programs.stop < len(self._arguments)  # others will use the KV of this part
        for index, trace in traces:
            if self._leaves:
                raise InterruptedError("run_batch was left")
            if not trace.requests:
                self._start(index, None)
                continue
            start = _Start(index, trace, batch, keep or trace.more)
            lines = [request_line(index, body, start.more) for body in trace.requests]
            trace.requests.clear()  # they are large
            if not part.take(index, lines):
                if not part.left:
                    raise ValueError(f"there is no room for {len(lines):,} requests at once")
                return
            sent += [(start, place) for place in range(len(lines))]
            yield from lines

    def _deliver(self, sent: list[tuple[_Start, int] | None], request: int, reply: Reply) -> None:
        entry, sent[request] = sent[request], None
        assert entry is not None
        start, place = entry
        start.answers[place] = reply
        start.missing -= 1
        if not start.missing:
            self._start(start.index, start)

    def _start(self, index: int, start: _Start | None) -> None:
        if self._stopped:
            return
        self._started[index] = True
        if start is None:
            self._untraced.append(index)
        else:
            self._ready.append(start)
        self._pool.submit(self._run_next)

    # In the pool's threads

    def _run_next(self) -> None:
        replay: Replay | None = None
        try:
            start = self._ready.popleft()
            index = start.index
            replay = Replay(start.trace, start.answers, start.batch, index)
        except IndexError:
            start, index = None, self._untraced.popleft()
        result: ProgramState | BaseException
        try:
            program, endpoint = self._program, self._channel.endpoint
            arguments, sampling = self._arguments[index], self._sampling
            if replay is None:
                result = interpreter.run_program(
                    program, endpoint, (), arguments, sampling, False, True
                )
            else:
                with listening(replay):
                    result = run_directly(program, endpoint, arguments, sampling)
        except BaseException as error:
            result = error
        with self._changed:
            self._results[index] = result
            self._unfinished -= 1
            if replay is not None:
                self._strays.note(replay.strayed(result))
            if self._bar is not None:
                self._bar.update()
            self._changed.notify()
        if replay is not None and start is not None and start.more:
            self._ended.append((start, replay.went_on))
            self._tell_ended()

    def _tell_ended(self) -> None:
        """Tell the server which programs have ended; one thread does for all that come meanwhile.
        What it is not told is released when the hand-over's connection closes."""
        while self._ended and self._telling.acquire(blocking=False):
            try:
                ended: defaultdict[str, dict[int, bool]] = defaultdict(dict)
                while self._ended:
                    start, went_on = self._ended.popleft()
                    ended[start.batch][start.index] = went_on
                for batch, programs in ended.items():
                    self._channel.end_programs(batch, programs)
            except Exception as error:
                log = logger.debug if self._untold or self._leaves else logger.warning
                log("The server was not told that programs ended: %r", error)
                self._untold = True
            finally:
                self._telling.release()
