"""What is read from a profiler's trace."""

import gzip
import json
from pathlib import Path

import pytest

from traces import mean_step, wait_for_trace

KERNELS = [
    ("nvjet_sm90_tst_256x128", 0.0, 3000.0),
    ("cutlass::device_kernel<flash::FlashAttnFwdSm90>", 3000.0, 1000.0),
    ("fused_decode_kernel", 4100.0, 500.0),  # after a gap of 100
    ("void flashinfer::norm::FusedAddRMSNormKernel<8u>", 4500.0, 200.0),  # overlaps by 100
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    events = [{"cat": "kernel", "name": n, "ts": ts, "dur": dur} for n, ts, dur in KERNELS]
    events.append({"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 9000.0})
    with gzip.open(tmp_path / "1-TP-0-DECODE.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    return tmp_path


def test_a_step_is_divided_by_what_its_kernels_are_for(folder: Path) -> None:
    step = mean_step(wait_for_trace(folder, "decode"), steps=2)
    kernels = step.pop("kernels_ms")
    assert step == pytest.approx(
        {
            "gpu_ms": 2.35,
            "idle_ms": 0.05,
            "attention_ms": 0.75,
            "matrices_ms": 1.5,
            "other_ms": 0.1,
        }
    )
    assert sum(kernels.values()) == pytest.approx(2.35)


def test_a_stage_that_was_not_traced_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no trace of prefill steps"):
        wait_for_trace(folder, "prefill", wait_seconds=0)
