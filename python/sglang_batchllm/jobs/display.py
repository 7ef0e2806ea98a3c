"""What a person sees of a job: a bar where there is a terminal, else a line now and then."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sglang_batchllm.jobs.status import Phase, Status

LINE_SECONDS = 10.0
BAR_SECONDS = 0.2

_PHASES: dict[Phase, str] = {
    "reading": "reading and tokenizing",
    "planning": "planning",
    "starting": "waiting for the engine",
    "running": "running",
    "restarting": "starting the engine again",
    "done": "done",
}


class Display(Protocol):
    def show(self, status: Status) -> None: ...

    def close(self) -> None: ...


def display_for(console: Console) -> Display:
    """On a console, best that of standard error."""
    return Bar(console) if console.is_terminal else Lines(console)


class Lines:
    """A line at once when something else begins or is to be said, and one every `LINE_SECONDS`."""

    def __init__(self, console: Console):
        self._console = console
        self._written = 0.0
        self._last: tuple[Phase, str | None] | None = None

    def show(self, status: Status) -> None:
        now = time.monotonic()
        new = (status.phase, status.note) != self._last
        if not new and now - self._written < LINE_SECONDS:
            return
        if status.note is not None and (self._last is None or status.note != self._last[1]):
            self._print(f"note: {status.note}")
        self._last = (status.phase, status.note)
        self._written = now
        self._print(f"{_PHASES[status.phase]}: {progress_of(status)}")

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


class Bar:
    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[about]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", phase="", about="", total=None)
        self._progress.start()
        self._shown = 0.0
        self._phase: Phase | None = None
        self._note: str | None = None

    def show(self, status: Status) -> None:
        now = time.monotonic()
        if status.phase == self._phase and now - self._shown < BAR_SECONDS:
            return
        if status.note != self._note:
            self._progress.console.print(f"note: {status.note}", markup=False, highlight=False)
            self._note = status.note
        self._shown, self._phase = now, status.phase
        self._progress.update(
            self._task,
            phase=_PHASES[status.phase],
            about=progress_of(status),
            total=status.total or None,
            completed=status.ended,
        )

    def close(self) -> None:
        self._progress.stop()


def progress_of(status: Status) -> str:
    """In a line."""
    if not status.total:
        return f"{status.rows_read:,} rows read"
    parts = [f"{status.done:,} done", f"{status.failed:,} failed", f"of {status.total:,}"]
    if status.found:
        parts[-1] += f" ({status.found:,} found done)"
    if status.computed_tokens is not None:
        computed, saved = status.computed_tokens, status.tokens_saved
        parts.append(f"prompt tokens {computed:,} computed, {saved:,} saved")
    speed = rates(status)
    if speed and status.phase == "running":
        parts.append(f"{speed['output_tokens_per_second']:,.0f} output tokens/s")
        if speed["requests_per_second"] and speed["seconds_running"] > LINE_SECONDS / 2:
            left = (status.total - status.ended) / speed["requests_per_second"]
            parts.append(f"{_clock(left)} left")
    return ", ".join(parts)


def rates(status: Status) -> dict[str, float]:
    """Of this run since its first request; empty before."""
    if status.running_since is None:
        return {}
    seconds = max(time.monotonic() - status.running_since, 1e-9)
    return {
        "seconds_running": seconds,
        "requests_per_second": (status.ended - status.found) / seconds,
        "output_tokens_per_second": (status.output_tokens - status.output_tokens_before) / seconds,
    }


def summary_of(status: Status) -> dict[str, Any]:
    """What there is to report of a job that has ended, for JSON."""
    return {
        "requests": status.total,
        "done": status.done,
        "failed": status.failed,
        "found_done": status.found,
        "output_tokens": status.output_tokens,
        "computed_tokens": status.computed_tokens,
        "tokens_saved": status.tokens_saved,
        "engine_deaths": status.deaths,
        "seconds": time.monotonic() - status.started,
        **rates(status),
        "plan": status.plan and status.plan.to_dict(),
    }


def print_summary(console: Console, status: Status, output: str) -> None:
    about = summary_of(status)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("requests", f"{status.done:,} done, {status.failed:,} failed")
    if status.found:
        table.add_row("", f"{status.found:,} of them were found done")
    if status.plan is not None and status.plan.prompt_tokens:
        plan = status.plan
        table.add_row("prompt tokens", f"{plan.prompt_tokens:,}, {plan.distinct_tokens:,} distinct")
    if status.computed_tokens is not None:
        table.add_row("", f"{status.computed_tokens:,} computed, {status.tokens_saved:,} saved")
    table.add_row("output tokens", f"{status.output_tokens:,}")
    if "seconds_running" in about:
        table.add_row(
            "speed",
            f"{about['requests_per_second']:,.1f} requests/s, "
            f"{about['output_tokens_per_second']:,.0f} output tokens/s",
        )
    if status.deaths:
        table.add_row("engine", f"died {status.deaths} times, and was started again")
    table.add_row("seconds", f"{about['seconds']:,.1f}")
    table.add_row("output", output)
    console.print(table)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
