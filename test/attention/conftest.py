"""Tests marked ``gpu`` need CUDA; tests in ``test_kernels.py`` need Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1 at the first import of Triton and for the whole
process, so ``test_interpreted.py`` runs that file in a process of its own; in any other it is
skipped. By hand: ``TRITON_INTERPRET=1 pytest test/attention/test_kernels.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (not torch.cuda.is_available() or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.path.name == "test_kernels.py" and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs under TRITON_INTERPRET=1"))
