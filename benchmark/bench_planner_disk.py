"""Time and memory of `plan_batch` for batches whose tokens are on disk.

`python benchmark/bench_planner_disk.py --folder /tmp` writes each batch there, plans it in a fresh
process and deletes it; the largest takes 10 GB. A batch is planned twice: when the file is not in
the page cache ("disk"), and when as much of it is there as fits ("memory").

Anonymous memory is RssAnon, asked for every 20 ms, which leaves out the pages of the file: these
the system takes back when it needs them. `rss_mib` has them in. `cpu_seconds` is the processor's
time, which other work on the machine does not lengthen much.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from results_file import ResultFile
from sglang_batchllm.planning import TokenTable, plan_batch

VOCABULARY = 128_000
SECONDS_BETWEEN = 0.02
MIB = 1 << 20
CHUNK = 10_000


@dataclass(frozen=True)
class Case:
    """`requests` prompts in random order: `head` tokens common to all, `prefix` more to each of
    `groups` groups, and from `shortest` to `longest` of each one's own."""

    name: str
    requests: int
    groups: int
    head: int
    prefix: int
    shortest: int
    longest: int

    def write(self, path: Path) -> np.ndarray:
        """Write the tokens as int32; returns the offsets, int64[requests + 1]."""
        rng = np.random.default_rng(0)
        prefixes = rng.integers(0, VOCABULARY, (self.groups, self.head + self.prefix), np.int32)
        prefixes[:, : self.head] = prefixes[0, : self.head]
        group = rng.permutation(np.arange(self.requests) % self.groups)
        own = rng.integers(self.shortest, self.longest + 1, self.requests)
        with path.open("wb") as file:
            for start in range(0, self.requests, CHUNK):
                chosen = prefixes[group[start : start + CHUNK]]
                rest = rng.integers(0, VOCABULARY, (len(chosen), self.longest), np.int32)
                rows = np.hstack([chosen, rest])
                lens = chosen.shape[1] + own[start : start + CHUNK]
                rows[np.arange(rows.shape[1]) < lens[:, None]].tofile(file)
            file.flush()
            os.fsync(file.fileno())
        return np.concatenate([[0], np.cumsum(own + self.head + self.prefix)])


CASES = [
    *(
        Case("instructions and items", requests, 200, 0, 40, 20, 20)
        for requests in (10_000, 100_000, 300_000, 1_000_000)
    ),
    *(
        Case("documents of 16 requests", 600_000, 37_500, 200, document - 200, 40, 120)
        for document in (500, 2_000, 4_000)
    ),
]


def plan_file(path: Path, offsets: Path, pipe: Connection) -> None:
    """Plan a batch and tell when it begins and what came out."""
    table = TokenTable(np.memmap(path, np.int32, "r"), np.load(offsets))
    plan_batch([[0, 0], [0, 0]])  # numpy imports some of its parts on first use
    pipe.send(None)
    pipe.recv()
    started = time.process_time()
    report = plan_batch(table).report
    pipe.send((report, time.process_time() - started))


def status_mib(pid: int, field: str) -> float:
    """A field of /proc/PID/status that is in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(path: Path, offsets: Path) -> dict[str, Any]:
    """Time and memory of one plan in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=plan_file, args=(path, offsets, theirs))
    process.start()
    assert process.pid is not None
    theirs.close()
    pipe.recv()
    before = peak = status_mib(process.pid, "RssAnon")
    pipe.send(None)
    while not pipe.poll(SECONDS_BETWEEN):
        peak = max(peak, status_mib(process.pid, "RssAnon"))
    rss = status_mib(process.pid, "VmHWM")
    report, cpu_seconds = pipe.recv()
    process.join()
    return {
        "groups": report.groups,
        "saving_ratio": round(report.saving_ratio, 3),
        "seconds": round(report.planning_seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "anonymous_mib_before": round(before, 1),
        "anonymous_mib": round(peak, 1),
        "anonymous_bytes_per_request": round((peak - before) * MIB / report.requests),
        "rss_mib": round(rss, 1),
    }


def rows_of(case: Case, folder: Path) -> Iterator[dict[str, Any]]:
    path, offsets = folder / "tokens.int32", folder / "offsets.npy"
    np.save(offsets, case.write(path))
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for place in ("disk", "memory"):
        tokens = path.stat().st_size // 4
        row = {"case": case.name, "requests": case.requests, "tokens": tokens, "from": place}
        yield {**row, **measure(path, offsets)}
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of plan_batch from disk")
    parser.add_argument("--folder", type=Path, required=True, help="where 10 GB are free")
    parser.add_argument("--out", type=Path, help="put the rows into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("case", "requests", "tokens", "from"))

    memory_gib = math.ceil(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)

    print("| case | requests | tokens | from | seconds | CPU s | anonymous MiB | RSS MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for found in rows_of(case, Path(folder)):
                row = file.add({**found, "machine_memory_gib": memory_gib})
                print(
                    f"| {row['case']} | {row['requests']:,} | {row['tokens']:,} | {row['from']} "
                    f"| {row['seconds']:.2f} | {row['cpu_seconds']:.2f} "
                    f"| {row['anonymous_mib']:,.0f} | {row['rss_mib']:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
