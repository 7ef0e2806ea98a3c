"""Where the GPU time of a decode step goes, from the traces of SGLang's profiler."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

ATTENTION_KERNELS = (
    *("flash", "attention", "attn"),  # fa3
    *("fused_decode_kernel", "merge_kernel", "_plan_kernel", "_emit_kernel"),  # ours, all of it
)
"""Parts of kernel names."""


def decode_step(folder: Path, steps: int, wait_seconds: float = 60) -> dict[str, Any]:
    """Mean GPU milliseconds of a profiled decode step: all kernels, attention's alone, none.

    folder: where SGLang wrote its traces, one of them for decode. Returns also the ten most
    expensive kernels by name. Raises FileNotFoundError if no decode trace appears in time.
    """
    deadline = time.monotonic() + wait_seconds
    while not (paths := [p for p in folder.rglob("*.json.gz") if "DECODE" in p.name.upper()]):
        if time.monotonic() > deadline:
            found = [path.name for path in folder.rglob("*")]
            raise FileNotFoundError(f"no decode trace among {found}")
        time.sleep(1)
    time.sleep(5)  # until it is written whole
    with gzip.open(paths[0]) as file:
        events = json.load(file)["traceEvents"]
    kernels: Counter[str] = Counter()
    spans = []
    for event in events:
        if event.get("cat") == "kernel":
            kernels[event["name"]] += event["dur"] / 1000 / steps
            spans.append((event["ts"], event["ts"] + event["dur"]))
    spans.sort()
    idle = 0.0
    busy_until = spans[0][0] if spans else 0.0
    for start, end in spans:
        idle += max(start - busy_until, 0.0)
        busy_until = max(busy_until, end)
    attention = sum(
        ms
        for name, ms in kernels.items()
        if any(part in name.lower() for part in ATTENTION_KERNELS)
    )
    total = sum(kernels.values())
    return {
        "gpu_ms": total,
        "idle_ms": idle / 1000 / steps,
        "attention_ms": attention,
        "attention_share": attention / total if total else 0.0,
        "kernels_ms": {name[:80]: ms for name, ms in kernels.most_common(14)},
    }
