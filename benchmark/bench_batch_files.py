"""Time and memory of `batchllm plan` over the number of requests in a file.

`python benchmark/bench_batch_files.py --folder /tmp` makes a tokenizer and, one after the other,
files of requests there, plans each with the command, and deletes them: chat requests of about 60
tokens, and a file of 5 GB. Memory is that of all processes of the command, asked for every 50 ms:
anonymous (RssAnon), which leaves out pages of files that the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from results_file import ResultFile

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_model import train_tokenizer

SECONDS_BETWEEN = 0.05
MIB = 1 << 20
WORDS = 5_000
VOCABULARY = 8_192


@dataclass(frozen=True)
class Case:
    """`requests` chat requests in random order: one of `heads` texts of `head` words, and `own`
    words of its own."""

    name: str
    requests: int
    heads: int
    head: int
    own: int

    def lines(self, words: list[str]) -> Iterator[str]:
        rng = random.Random(0)
        heads = [" ".join(rng.choices(words, k=self.head)) for _ in range(self.heads)]
        for number in range(self.requests):
            messages = [
                {"role": "system", "content": rng.choice(heads)},
                {"role": "user", "content": " ".join(rng.choices(words, k=self.own))},
            ]
            body = {"messages": messages, "max_tokens": 16}
            yield json.dumps(
                {"custom_id": f"request-{number}", "url": "/v1/chat/completions", "body": body}
            )


SHORT = [Case("instructions and items", n, 200, 30, 12) for n in (10_000, 100_000, 1_000_000)]
LARGE = Case("documents of 16 requests", 720_000, 45_000, 1_100, 60)


def make_words(folder: Path) -> list[str]:
    """Words of two syllables or three, and in `folder` a tokenizer that knows most of them."""
    rng = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.choice((2, 3)))) for _ in range(WORDS)]
    train_tokenizer(folder, [" ".join(words)] * 4, VOCABULARY)
    return words


def measure(requests: Path, tokenizer: Path) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("batchllm")), "plan", "-i", str(requests)]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--tokenizer", str(tokenizer)],
        stdout=subprocess.PIPE,
        text=True,
    )
    peak, peaks = 0, [0, 0]
    whole = psutil.Process(process.pid)
    while process.poll() is None:
        found = [anonymous(one) for one in (whole, *whole.children(recursive=True))]
        peak = max(peak, sum(found))
        peaks = [max(peaks[0], found[0]), max(peaks[1], *found[1:], 0)]
        time.sleep(SECONDS_BETWEEN)
    assert process.stdout is not None and process.returncode == 0
    told = process.stdout.read()
    planned = re.search(r"planned in +([\d.]+) s", told)
    tokens = re.search(r"prompt tokens +([\d,]+)", told)
    assert planned and tokens, told
    return {
        "tokens": int(tokens[1].replace(",", "")),
        "seconds": round(time.monotonic() - started, 1),
        "planning_seconds": float(planned[1]),
        "anonymous_mib": round(peak / MIB),
        "main_process_mib": round(peaks[0] / MIB),
        "reading_process_mib": round(peaks[1] / MIB),
    }


def anonymous(process: psutil.Process) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(sizes[0]) << 10 if sizes else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where 12 GB are free")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    parser.add_argument("--requests", type=int, nargs="*", help="only cases of so many requests")
    args = parser.parse_args()
    file = ResultFile(args.out, ("case", "requests"))
    print("| case | requests | MB | tokens | seconds | planning | anonymous MiB | main process |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        words = make_words(Path(folder) / "tokenizer")
        for case in (*SHORT, LARGE):
            if args.requests and case.requests not in args.requests:
                continue
            path = Path(folder) / "requests.jsonl"
            with path.open("w") as out:
                out.writelines(line + "\n" for line in case.lines(words))
            row = {"case": case.name, "requests": case.requests, "bytes": path.stat().st_size}
            row = file.add({**row, **measure(path, Path(folder) / "tokenizer")})
            print(
                f"| {row['case']} | {row['requests']:,} | {row['bytes'] / 1e6:,.0f} "
                f"| {row['tokens']:,} | {row['seconds']:,.0f} | {row['planning_seconds']:.1f} "
                f"| {row['anonymous_mib']:,} | {row['main_process_mib']:,} |",
                flush=True,
            )
            path.unlink()


if __name__ == "__main__":
    main()
