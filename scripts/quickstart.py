"""Ask every question about every document, with `--batchllm` and without, and compare.

Starts a real SGLang server, runs an `sgl.function` program over a table of documents and
questions with `run_batch`, and prints answers, the batch report and the comparison. Without
`--model` it makes a tiny random Llama, which needs no download and no GPU.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tiny_model import make_tiny_model

WORK_DIR = Path(__file__).resolve().parent.parent / ".quickstart"
SEED = 0
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 8192
DOCUMENT_CHARS = (1200, 4000)
"""Shorter documentation is left out, longer is cut: about 300 to 1,000 tokens remain."""
ANSWER_TOKENS = 16
KV_TOKENS = 8192
"""Room of the tiny model's servers: for about a third of the documents, so that memory counts."""
STOP_SECONDS = 1.0

QUESTIONS = [
    "What is this module for?",
    "Which class or function would you use first?",
    "What can go wrong when using it?",
    "Which exceptions does the text mention?",
    "Is it meant for beginners or for experts?",
    "Which other modules does it relate to?",
    "Give a title of five words for this text.",
    "What does the text leave unexplained?",
    "Does it read or write files?",
    "Is anything said about threads or processes?",
    "Which defaults does the text mention?",
    "What is the longest name that it documents?",
]


def main() -> None:
    options = parse_options()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop_servers_and_exit)

    # Python 3.12 has something to say of a package of SGLang's whenever it is first imported.
    warnings.filterwarnings("ignore", category=SyntaxWarning)

    documents = choose_documents(options.documents)
    table = [
        {"document": document, "question": question}
        for document, question in itertools.product(documents, QUESTIONS[: options.questions])
    ]
    random.Random(SEED).shuffle(table)
    print(f"{len(table)} prompts: {options.documents} documents x {options.questions} questions")
    if options.model is None:
        print(
            f"The servers have room for the KV of {KV_TOKENS:,} tokens, fewer than the documents."
        )

    flags = ["--model-path", options.model or str(tiny_model()), *options.server_flags]
    if options.model is None:
        flags += tiny_model_flags()
    ours = run_on_server([*flags, "--batchllm"], table, "server.log")
    show_answers(table, ours, is_random=options.model is None)
    show_reports(ours)
    stock = run_on_server(flags, table, "server-stock.log")
    show_comparison(ours, stock)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="a model's folder or hub name, instead of the tiny one")
    parser.add_argument("--documents", type=int, default=24, help="default: %(default)s")
    parser.add_argument(
        "--questions",
        type=int,
        default=8,
        choices=range(1, len(QUESTIONS) + 1),
        help="default: %(default)s",
        metavar=f"1..{len(QUESTIONS)}",
    )
    parser.add_argument(
        "server_flags", nargs="*", help="after a --: more flags for both servers", metavar="FLAG"
    )
    return parser.parse_args()


# Documents


def choose_documents(number: int) -> list[str]:
    """Documentation of `number` modules of Python's standard library, the same every time."""
    shortest, longest = DOCUMENT_CHARS
    texts = [text[:longest] for text in library_texts() if len(text) >= shortest]
    if not 1 <= number <= len(texts):
        sys.exit(f"error: --documents is {number}; this Python has from 1 to {len(texts)}.")
    return random.Random(SEED).sample(texts, number)


def library_texts() -> Iterator[str]:
    """The documentation of each module, in order of name; nothing is imported for it."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("*/__init__.py")]):
        name = path.parent.name if path.stem == "__init__" else path.stem
        if name in sys.stdlib_module_names and not name.startswith("_"):
            module = ast.parse(path.read_text(encoding="utf-8"))
            yield "\n\n".join(docstrings(module, name))


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(node: ast.Module | Documented, name: str) -> Iterator[str]:
    """The docstring of `node` and of all that is public in it, each under its dotted name."""
    text = ast.get_docstring(node)
    if text:
        yield f"{name}: {text}"
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            # A type alias (Python 3.12) has a name too, which is no string.
            if isinstance(child, Documented) and not child.name.startswith("_"):
                yield from docstrings(child, f"{name}.{child.name}")


# Model


def tiny_model() -> Path:
    """The folder of a random Llama of two layers and a tokenizer trained on the documents."""
    folder = WORK_DIR / "tiny-chat-llama"
    if folder.exists():
        return folder
    print("Making a tiny random Llama and its tokenizer ...", flush=True)
    unfinished = folder.with_suffix(".unfinished")
    make_tiny_model(
        unfinished, library_texts(), VOCAB_SIZE, CONTEXT_LENGTH, hidden_size=128, head_dim=64
    )
    unfinished.rename(folder)
    return folder


def tiny_model_flags() -> list[str]:
    """Scarce memory; on a CPU, a type in which answers can be compared exactly."""
    import torch

    flags = ["--max-total-tokens", str(KV_TOKENS)]
    if torch.accelerator.is_available():
        return flags
    # Matrices this small gain nothing from threads, and lose much where cores are shared.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return [*flags, "--dtype", "float32"]


# Servers


class ServerError(Exception):
    """The server did not start or did not answer; its log says why."""


class Server:
    """An SGLang server in its own process group, so that all its processes can be stopped."""

    running: Server | None = None

    def __init__(self, flags: list[str], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", *flags, "--port", str(port)]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        Server.running = self

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Return once it answers. A large model may load for long, so only its end is an error."""
        while True:
            if self._process.poll() is not None:
                raise ServerError("the server ended while starting")
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)

    def stop(self) -> None:
        """End every process of the server: politely for a second, then at once, since a server
        that is asked to end finishes its requests first."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        Server.running = None


def stop_servers_and_exit(signum: int, _: FrameType | None) -> None:
    """On Ctrl-C: `run_batch` would first wait for all its threads, so leave without them."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    logging.disable()  # that requests break off now is no news
    if Server.running is not None:
        Server.running.stop()
    os._exit(128 + signum)


# The batch


@dataclass
class Outcome:
    answers: list[str]
    seconds: float
    prompt_tokens: int
    computed_tokens: int
    reports: list[dict[str, Any]]


def run_on_server(flags: list[str], table: list[dict[str, str]], log_name: str) -> Outcome:
    """Start a server, run the batch on it, stop it. Ends the program when that fails."""
    WORK_DIR.mkdir(exist_ok=True)
    log = WORK_DIR / log_name
    with_batchllm = "--batchllm" in flags
    print(
        f"\nStarting the server {'with' if with_batchllm else 'without'} --batchllm ...", flush=True
    )
    try:
        with Server(flags, log) as server:
            started = time.monotonic()
            import sglang  # takes seconds, which the server needs too  # noqa: F401

            server.wait_until_ready()
            print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
            return run_table(server.url, table, with_batchllm)
    except ServerError as error:
        tail = log.read_text(errors="replace").splitlines()[-30:]
        print("\n".join(tail), file=sys.stderr)
        sys.exit(f"error: {error}; the lines above end its log, {log}")


def run_table(url: str, table: list[dict[str, str]], with_batchllm: bool) -> Outcome:
    import sglang as sgl

    def answer_question(s: Any, document: str, question: str) -> None:
        s += "Read this documentation and answer the question below it.\n\n" + document
        s += "\n\nQuestion: " + question + "\nAnswer:"
        s += sgl.gen("answer", max_tokens=ANSWER_TOKENS)

    program: Any = sgl.function(answer_question)
    began, clock = time.time(), time.monotonic()
    states = program.run_batch(
        table, backend=sgl.RuntimeEndpoint(url), temperature=0, progress_bar=sys.stderr.isatty()
    )
    seconds = time.monotonic() - clock
    for state in states:
        if state.error() is not None:
            raise ServerError(f"a request failed ({state.error()})")

    facts: list[dict[str, Any]] = [state.get_meta_info("answer") for state in states]
    return Outcome(
        answers=[state["answer"] for state in states],
        seconds=seconds,
        prompt_tokens=sum(fact["prompt_tokens"] for fact in facts),
        computed_tokens=sum(fact["prompt_tokens"] - fact["cached_tokens"] for fact in facts),
        reports=batch_reports(url, began) if with_batchllm else [],
    )


def batch_reports(url: str, began: float) -> list[dict[str, Any]]:
    """The reports of what the server ran since the time `began`."""
    from sglang_batchllm import get_report

    deadline = time.monotonic() + 5
    # The last answer may be here just before its batch is closed.
    while (report := get_report(url))["running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    return [batch for batch in report["batches"] if batch["started"] >= began]


# Output


def show_answers(table: list[dict[str, str]], outcome: Outcome, is_random: bool) -> None:
    print(
        "\nSample answers" + (" (the model is random, so they mean nothing)" if is_random else "")
    )
    for row, answer in list(zip(table, outcome.answers, strict=True))[:3]:
        module = row["document"].partition(":")[0]
        print(f"  {module}: {row['question']} -> {answer.strip()[:70]!r}")


def show_reports(outcome: Outcome) -> None:
    """Normally one: a report is closed when the server has nothing left to do."""
    span = "{min:,.0f} to {max:,.0f}, median {p50:,.0f}"
    for number, report in enumerate(outcome.reports, start=1):
        requests, aborted = report["requests"], report["aborted"]
        rows = [
            ("requests", f"{requests:,} of {len(outcome.answers):,} sent ({aborted:,} aborted)"),
            ("prefix groups", f"{report['groups']:,}"),
        ]
        if report["groups"]:
            rows += [
                ("  requests in a group", span.format(**report["group_size_quantiles"])),
                ("  tokens in its prefix", span.format(**report["prefix_len_quantiles"])),
            ]
        rows += [
            ("prompt tokens", f"{report['prompt_tokens']:,}"),
            ("  distinct", f"{report['distinct_tokens']:,}"),
            ("  computed", f"{report['computed_tokens']:,}"),
            ("  saved", f"{report['tokens_saved']:,} ({report['saving_ratio']:.2f}x)"),
            ("most tokens pinned", f"{report['peak_pinned_tokens']:,}"),
            ("planning", f"{report['planning_seconds'] * 1000:.0f} ms"),
        ]
        print(f"\nBatch report {number} of {len(outcome.reports)} (GET /batchllm/report)")
        for name, value in rows:
            print(f"  {name:<24} {value}")


def show_comparison(ours: Outcome, stock: Outcome) -> None:
    print(f"\n  {'':<24} {'--batchllm':>12} {'without':>12}")
    for name, ours_value, stock_value in [
        ("seconds", f"{ours.seconds:.1f}", f"{stock.seconds:.1f}"),
        ("requests/s", *(f"{len(o.answers) / o.seconds:.1f}" for o in (ours, stock))),
        ("prompt tokens", f"{ours.prompt_tokens:,}", f"{stock.prompt_tokens:,}"),
        ("  of these, computed", f"{ours.computed_tokens:,}", f"{stock.computed_tokens:,}"),
    ]:
        print(f"  {name:<24} {ours_value:>12} {stock_value:>12}")
    same = sum(a == b for a, b in zip(ours.answers, stock.answers, strict=True))
    print(f"  answers identical: {same} of {len(ours.answers)}")
    print(
        "\nWith --batchllm a document is computed once for all of its questions; without, it is "
        "computed again\nwhenever the next question comes before it is in the cache, or after it "
        "was evicted from there."
    )


if __name__ == "__main__":
    main()
