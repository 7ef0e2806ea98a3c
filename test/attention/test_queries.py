"""Queries packed in wide elements are the same queries."""

import pytest
import torch

from sglang_batchllm.attention.queries import packed

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
