"""The command line: ``batchllm run``, ``batchllm plan`` and ``batchllm merge``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import sglang_batchllm
from sglang_batchllm.jobs.errors import JobError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(sglang_batchllm.__version__)
def main() -> None:
    """Run large batches of prompts on SGLang, with every shared prompt token computed once."""


INPUTS = click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    required=True,
    help="Requests in OpenAI's batch format, one JSON a line, or a table (.parquet, .csv). "
    "Several times for several files; - reads standard input.",
)
COLUMN = click.option("--prompt-column", help="The column of a table that holds the prompts.")
TEMPLATE = click.option("--template", help="A prompt with columns of a table in braces: '{text}'.")
ENDPOINT = click.option(
    "--endpoint",
    type=click.Choice(["chat", "completions"]),
    default="chat",
    show_default=True,
    help="What the prompts of a table are for.",
)
MODEL = click.option("--model", help="A model's folder or its Hugging Face id.")
TOKENIZER = click.option("--tokenizer", help="Plans with this tokenizer instead of the model's.")


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@INPUTS
@click.option(
    "-o",
    "--output",
    required=True,
    help="Where the records go: appended to, so that the same command goes on after anything. "
    "For a table, the table with the answers; - writes to standard output at the end.",
)
@click.option("--errors", type=click.Path(path_type=Path), help="Records of failed requests.")
@MODEL
@click.option("--url", help="A server that runs, with or without --batchllm, in place of --model.")
@click.option("--api-key", help="Of the server; with --url, else that in OPENAI_API_KEY.")
@click.option("--params", default="{}", help="JSON that bodies have where they say nothing else.")
@COLUMN
@TEMPLATE
@ENDPOINT
@TOKENIZER
@click.option("--report", type=click.Path(path_type=Path), help="Write a summary as JSON.")
@click.pass_context
def run(context: click.Context, **options: Any) -> None:
    """Answer every request of a file.

    With --model, all further flags are those of SGLang's server: --tp-size 2, and so on. The same
    command again does what is missing.
    """
    from sglang_batchllm.client.run_command import run_files

    _guarded(lambda console: run_files(console, context.args, **options))


@main.command()
@INPUTS
@MODEL
@COLUMN
@TEMPLATE
@ENDPOINT
@TOKENIZER
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with the prefix tree.")
@click.option(
    "--shards", type=click.IntRange(min=1), help="Cut the file into so many, for as many engines."
)
@click.option("--into", type=click.Path(path_type=Path), help="The folder for --shards.")
@click.option("--page-size", default=1, show_default=True, help="Tokens of a KV page.")
@click.option("--served-model-name", help="As of the server.")
def plan(**options: Any) -> None:
    """Say what the requests of a file share, without an engine."""
    from sglang_batchllm.client.plan_command import run_plan

    _guarded(lambda console: run_plan(console, **options))


@main.command()
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="The file of requests that was cut, or the table.",
)
@click.argument("outputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="A new file for all."
)
def merge(inputs: tuple[Path, ...], outputs: tuple[Path, ...], output: Path) -> None:
    """Put the OUTPUTS of several runs together, in the order of the requests."""
    from sglang_batchllm.jobs.merge import merge as merge_records

    def act(console: Console) -> None:
        merged = merge_records(inputs, outputs, output)
        console.print(f"{merged.records:,} records, {merged.failed:,} of requests that failed")

    _guarded(act)


def _guarded(act: Callable[[Console], None]) -> None:
    """A sentence in place of a traceback."""
    console = Console(stderr=True)
    try:
        act(console)
    except JobError as error:
        console.print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(1)
