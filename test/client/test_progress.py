"""A bar on a terminal; elsewhere a line now and then."""

import os
import pty
import sys

import pytest
import tqdm

from sglang_batchllm.client import progress
from sglang_batchllm.client.progress import show_progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass when it is told so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_now_and_then(capfd, clock):
    bar = show_progress(1000)
    for _ in range(1000):
        clock[0] += 0.025
        bar.update()
    bar.close()
    err = capfd.readouterr().err
    assert "\r" not in err
    assert [line.split("|")[-1].split()[0] for line in err.splitlines()] == [
        "400/1000",
        "800/1000",
        "1000/1000",
    ]


def test_of_a_short_batch_only_the_last_line(capfd):
    bar = show_progress(20)
    for _ in range(20):
        bar.update()
    bar.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "20/20" in line


def test_on_a_terminal_and_in_a_notebook_it_is_sglangs(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours):
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = show_progress(2)
        assert type(bar) is tqdm.tqdm
        bar.close()
        monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    bar = show_progress(2)
    assert type(bar) is tqdm.tqdm
    bar.close()
