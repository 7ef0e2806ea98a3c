"""Queries packed in wide elements are the same queries."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sglang_batchllm.edge.queries import COPYING_BACKENDS, packed

QKV = torch.arange(37 * 96, dtype=torch.float32).reshape(37, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "part",
    [
        (slice(None), slice(0, 64)),
        (slice(3, None), slice(32, 96)),
        (slice(None), slice(1, 65)),  # starts in the middle of an element
        (slice(None), slice(0, 63)),
        (slice(None), slice(0, 96, 2)),
        (slice(0, 0), slice(0, 64)),
        (slice(None), slice(None)),
    ],
)
def test_packed_is_contiguous(part: tuple[slice, slice], dtype: torch.dtype) -> None:
    queries = QKV.to(dtype)[part]
    result = packed(queries)
    assert result.is_contiguous()
    assert result.dtype == dtype
    assert torch.equal(result, queries)


def test_the_backends_that_copy_are_known_by_name() -> None:
    """By their text, since they need CUDA to be imported."""
    text = ""
    for module in ("flashattention_backend", "flashinfer_backend"):
        spec = importlib.util.find_spec(f"sglang.srt.layers.attention.{module}")
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text()
        assert "q.contiguous()" in source
        text += source
    for name in COPYING_BACKENDS:
        assert f"class {name}(" in text
