"""``batchllm plan``: what a file's requests share, without an engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sglang_batchllm.client.sources import check_writable, open_source
from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.index import Index
from sglang_batchllm.jobs.inputs import Inputs
from sglang_batchllm.jobs.order import plan_rows
from sglang_batchllm.jobs.page import write_page
from sglang_batchllm.jobs.reading import Reading, read_inputs
from sglang_batchllm.jobs.rows import Rules
from sglang_batchllm.jobs.shards import shard_rows, write_shards
from sglang_batchllm.planning import BatchPlan, Partition

SHOWN = 5
"""Rows at the beginning of the order."""


def run_plan(
    console: Console,
    *,
    inputs: Sequence[str],
    model: str | None,
    tokenizer: str | None,
    served_model_name: str | None,
    html: Path | None,
    page_size: int,
    shards: int | None,
    into: Path | None,
    **prompts: Any,
) -> None:
    """The options are those of the command; prompts are for `sources.open_source`. Prints to
    standard output. Raises JobError."""
    if model is None and tokenizer is None:
        raise JobError("give --model, whose tokenizer and chat template the plan is made with")
    if (shards is None) != (into is None):
        raise JobError("--shards and --into go together: how many files, and the folder for them")
    if html is not None:
        check_writable(html)
    named = served_model_name or model
    rules = Rules(models=None if named is None else [named])
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(inputs, Path(folder) / "plan", **prompts)
        reading = Reading(rules, tokenizer or model)
        with console.status("reading and tokenizing"):
            index, _ = read_inputs(source.inputs, reading, Path(folder) / "ids")
        if index.unit != "tokens":
            raise JobError(f"{tokenizer or model} has no tokenizer that can be loaded")
        if not len(index):
            raise JobError(f"{', '.join(inputs)}: no request can run: {_first_bad(index)}")
        with console.status("planning"):
            plan = plan_rows(index, page_size)
        rows = Inputs(source.inputs, index, rules)
        spread = None if shards is None else shard_rows(index, plan, shards)
        if spread is not None and into is not None:
            write_shards(source.inputs, index, spread.shard_of, len(spread.seconds), into)
        _print(plan, index, rows, spread)
        if html is not None:
            table = index.table()

            def tokens_of(row: int, start: int, end: int) -> np.ndarray:
                first = int(table.offsets[row])
                return np.asarray(table.tokens[first + start : first + end])

            title = ", ".join(inputs)
            write_page(
                html,
                plan,
                tokens_of,
                reading.reader().text,
                lambda row: rows.read(row).custom_id,
                title,
            )
        rows.close()


def _print(plan: BatchPlan, index: Index, rows: Inputs, spread: Partition | None) -> None:
    report = plan.report
    suffix = plan.prompt_lens - plan.shared_len
    depth = int(plan.tree.depth[plan.tree.request_node].max())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("requests", f"{report.requests:,}")
    if index.bad:
        table.add_row("", f"{len(index.bad):,} rows can't run: {_first_bad(index)}")
    table.add_row("prompt tokens", f"{report.prompt_tokens:,}")
    table.add_row("distinct tokens", f"{report.distinct_tokens:,}, each computed once")
    table.add_row("saved", f"{report.tokens_saved:,} ({report.saving_ratio:.2f} x fewer)")
    table.add_row("prefix groups", f"{report.groups:,}, sharing degree {report.sharing_degree:.1f}")
    if report.groups:
        table.add_row("  members", _spread(report.group_size_quantiles))
        table.add_row("  prefix tokens", _spread(report.prefix_len_quantiles))
    table.add_row("suffix tokens", f"median {np.median(suffix):,.0f}, at most {suffix.max():,}")
    table.add_row("KV of one path", f"{depth:,} tokens and what the request decodes")
    if spread is not None:
        over = spread.balance - 1
        table.add_row("shards", f"{len(spread.seconds):,}, the longest {over:.1%} over the mean")
        table.add_row("computed twice", f"{spread.repeated_tokens:,} tokens, by several shards")
    first = ", ".join(rows.read(row).custom_id for row in plan.order[:SHOWN].tolist())
    more = ", ..." if report.requests > SHOWN else ""
    table.add_row("order", f"{first}{more}")
    table.add_row("planned in", f"{report.planning_seconds:.2f} s")
    Console(soft_wrap=True).print(table)


def _spread(quantiles: dict[str, float]) -> str:
    return (
        f"median {quantiles['p50']:,.0f}, from {quantiles['min']:,.0f} to {quantiles['max']:,.0f}"
    )


def _first_bad(index: Index) -> str:
    if not index.bad:
        return "it has no requests"
    bad = index.bad[0]
    return f"line {bad.line}: {bad.error}"
