"""Kill `batchllm run` at random moments, run the same command again, and compare.

`python benchmark/kill_and_resume.py --kills 20` runs a file of 2,000 chat requests on a tiny model
once undisturbed, and once with kills (SIGKILL) of the runner, of the engine's scheduler, or of all
processes. After each kill the output must parse, and in the end it must hold one record for each
request, equal to those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from processes import children_named
from results_file import ResultFile

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_model import make_tiny_model

WORDS = [f"word{number}" for number in range(300)]
NAME = "tiny"
KINDS = ("runner", "scheduler", "everything")
GIVE_UP_SECONDS = 600


def write_requests(path: Path, number: int) -> list[str]:
    """Of 50 documents; returns the documents."""
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=40)) for _ in range(50)]
    with path.open("w") as file:
        for row in range(number):
            text = f"{rng.choice(documents)}\nQuestion {rng.randrange(10_000)}?"
            body = {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": rng.choice((2, 4, 8, 16)),
                "temperature": 0,
            }
            line = {"custom_id": f"row-{row}", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return documents


def start(folder: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("batchllm")), "run"]
    command += ["-i", str(folder / "requests.jsonl"), "-o", str(output)]
    command += ["--model", str(folder / "model"), "--served-model-name", NAME]
    command += ["--max-total-tokens", "4000", "--dtype", "float32"]
    log = (folder / "runner.log").open("ab")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env
    )


def kill(kind: str, process: subprocess.Popen[bytes]) -> bool:
    """Returns whether there was anything to kill."""
    if kind == "scheduler":
        schedulers = children_named("scheduler", process.pid)
        if schedulers:
            schedulers[0].kill()
        return bool(schedulers)
    victims = children_named("", process.pid) if kind == "everything" else []
    process.kill()
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    return True


def records(output: Path, is_written: bool = False) -> list[dict[str, Any]]:
    """Every line must parse; of a file that is written just now, every line that has its end."""
    data = output.read_bytes() if output.exists() else b""
    if is_written:
        data = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in data.splitlines()]


def answers(output: Path) -> dict[str, str]:
    found = records(output)
    assert all(record["error"] is None for record in found), "a record of an error"
    counts = Counter(record["custom_id"] for record in found)
    assert set(counts.values()) == {1}, f"{counts.most_common(3)}"
    return {
        record["custom_id"]: record["response"]["body"]["choices"][0]["message"]["content"]
        for record in found
    }


def run_to_the_end(folder: Path, output: Path) -> float:
    started = time.monotonic()
    process = start(folder, output)
    status = process.wait(GIVE_UP_SECONDS)
    assert status == 0, f"exit status {status}; see the log in {folder}"
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="put a row for each kill into this file")
    args = parser.parse_args()
    file = ResultFile(args.out, ("case", "kill"))
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    documents = write_requests(folder / "requests.jsonl", args.requests)
    make_tiny_model(folder / "model", documents, 512, 2048)
    seconds = run_to_the_end(folder, folder / "undisturbed.jsonl")
    print(f"undisturbed: {seconds:.0f} s", flush=True)

    output = folder / "killed.jsonl"
    process = start(folder, output)
    share = args.requests * 0.9 / args.kills
    for number in range(1, args.kills + 1):
        kind = KINDS[number % len(KINDS)]
        before = len(records(output, is_written=True))
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 15))  # while it starts
        else:
            wanted = before + rng.uniform(0.2, 1.6) * share
            deadline = time.monotonic() + GIVE_UP_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                if len(records(output, is_written=True)) >= wanted:
                    break
                time.sleep(rng.uniform(0.01, 0.05))
        while process.poll() is None and not kill(kind, process):
            time.sleep(0.5)  # no scheduler yet
        done = len(records(output, is_written=process.poll() is None))
        row = {"case": "kill and resume", "kill": number, "killed": kind, "records": done}
        print(f"kill {number}: {kind} with {done} of {args.requests} records", flush=True)
        file.add(row)
        if process.poll() is not None:
            process = start(folder, output)
    status = process.wait(GIVE_UP_SECONDS)
    assert status == 0, f"exit status {status}; see the log in {folder}"
    same = answers(output) == answers(folder / "undisturbed.jsonl")
    assert same and len(answers(output)) == args.requests
    left = [one for one in psutil.process_iter(["cmdline"]) if str(folder) in str(one.info)]
    assert not left, f"still there: {left}"
    print(
        f"{args.kills} kills: one record for each of {args.requests} requests, all as undisturbed"
    )
    file.add({"case": "kill and resume", "kill": "none left", "requests": args.requests})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
