"""Property tests look at other examples in every run, wherever they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROPERTY = """
from hypothesis import given, strategies as st

@given(st.integers(0, 2**64))
def test_draws(number):
    print("drawn", number)
"""


@pytest.mark.parametrize("ci", [{}, {"CI": "true"}])
def test_two_runs_draw_different_examples(tmp_path: Path, ci: dict[str, str]):
    """Under the profile of the conftest beside all tests, the planner's tests collected too."""
    tests = Path(__file__).parents[1]
    (tmp_path / "test_draws.py").write_text(PROPERTY)
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | ci
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-c", str(tests.parent / "pyproject.toml"), "-k", "test_draws"]
    command += [str(tests / "planning"), str(tmp_path)]
    runs = [
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stdout
    first, second = (
        [line for line in run.stdout.splitlines() if line.startswith("drawn")] for run in runs
    )
    assert len(first) > 10
    assert first != second
