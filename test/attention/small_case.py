"""A small run of the kernels for compute-sanitizer, which slows a GPU down a hundredfold.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python
test/attention/small_case.py The same with --tool racecheck. Without the caching, an access beyond
a tensor is beyond an allocation.
"""

from __future__ import annotations

import torch

from cases import make_batch, make_fused, relative_error, run
from sglang_batchllm.attention.fused import choose_config

if __name__ == "__main__":
    groups = [(130, [1, 7, 30, 2, 65, 3]), (0, [300]), (33, [9, 4]), (70, [3] * 20)]
    batch = make_batch(groups, 2, 4, 128, torch.bfloat16, device="cuda", padding=2)
    fused = make_fused(batch, choose_config(torch.bfloat16, 128, 4), num_programs=8)
    error = relative_error(run(fused, batch), batch.reference())
    torch.cuda.synchronize()
    print(f"relative error {error:.1e}")
    assert error < 1e-2
