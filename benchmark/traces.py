"""Where the GPU time of a step goes, from the traces of SGLang's profiler."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = {
    "attention": (
        *("flash::", "attention", "attn"),  # fa3; norms are "flashinfer::norm"
        *("fused_decode_kernel", "merge_kernel", "plan_kernel", "_emit_kernel"),  # ours
    ),
    "matrices": ("nvjet", "gemm", "splitkreduce"),
}
"""Parts of kernel names; what has none of them is of kind "other"."""

STAGES = {"prefill": "EXTEND", "decode": "DECODE"}
"""A stage's name in the names of trace files."""


def wait_for_trace(folder: Path, stage: str, wait_seconds: float = 60) -> Path:
    """The trace of a stage that SGLang writes into `folder`, once it is whole.

    Raises FileNotFoundError if none appears in time.
    """
    deadline = time.monotonic() + wait_seconds
    while not (paths := [p for p in folder.rglob("*.json.gz") if STAGES[stage] in p.name.upper()]):
        if time.monotonic() > deadline:
            found = [path.name for path in folder.rglob("*")]
            raise FileNotFoundError(f"no trace of {stage} steps among {found}")
        time.sleep(0.5)
    size = -1
    while size != (size := paths[0].stat().st_size):
        time.sleep(2)
    return paths[0]


def mean_step(trace: Path, steps: int) -> dict[str, Any]:
    """Milliseconds of GPU time of one of the `steps` steps in a trace: all kernels, by kind, the
    most expensive kernels by name, and the gaps between kernels (`idle_ms`)."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    kernels: Counter[str] = Counter()
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    spans = []
    for event in events:
        if event.get("cat") == "kernel":
            name, ms = event["name"], event["dur"] / 1000 / steps
            kernels[name] += ms
            kinds[_kind(name)] += ms
            spans.append((event["ts"], event["ts"] + event["dur"]))
    spans.sort()
    idle = 0.0
    busy_until = spans[0][0] if spans else 0.0
    for start, end in spans:
        idle += max(start - busy_until, 0.0)
        busy_until = max(busy_until, end)
    return {
        "gpu_ms": sum(kernels.values()),
        "idle_ms": idle / 1000 / steps,
        **{f"{kind}_ms": ms for kind, ms in kinds.items()},
        "kernels_ms": {name[:80]: ms for name, ms in kernels.most_common(14)},
    }


def _kind(kernel: str) -> str:
    kernel = kernel.lower()
    for kind, parts in KINDS.items():
        if any(part in kernel for part in parts):
            return kind
    return "other"
