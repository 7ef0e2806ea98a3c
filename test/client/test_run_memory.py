"""The memory of a whole `batchllm run`, from the requests' file to its last record."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pretended_server import Script, requests, serving
from test_run_command import COMMAND, process_of

FEW, MANY = 2_000, 20_000

ROW_BYTES = 700
"""What docs/batch_files.md promises for each request."""

SLACK_BYTES = 8 << 20
"""Pages that the allocator keeps and how full the window happens to be, of 512 requests here."""


def run_memory(url: str, folder: Path, rows: int) -> int:
    """Most anonymous memory of the runner, without the processes that tokenize, in bytes."""
    inputs, output = folder / f"{rows}.jsonl", folder / f"{rows}-out.jsonl"
    inputs.write_bytes(requests(rows))
    command = [*COMMAND, "-i", inputs, "-o", output, "--url", url]
    peak = 0
    with process_of(command, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) << 10)
            time.sleep(0.02)
        assert process.returncode == 0
    assert output.read_bytes().count(b"\n") == rows
    return peak


@pytest.mark.timeout(600)
@pytest.mark.skipif(not psutil.LINUX, reason="reads /proc")
def test_a_job_takes_little_more_for_ten_times_the_requests(tmp_path: Path):
    with serving(Script()) as server:
        few, many = (run_memory(server.url, tmp_path, rows) for rows in (FEW, MANY))
    print(f"{few >> 10:,} and {many >> 10:,} KiB, {(many - few) / (MANY - FEW):.0f} bytes a row")
    assert many - few < (MANY - FEW) * ROW_BYTES + SLACK_BYTES
