"""A small run of the kernels for compute-sanitizer, which slows a GPU down a hundredfold.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python
test/attention/small_case.py The same with --tool racecheck. Without the caching, an access beyond
a tensor is beyond an allocation.
"""

from __future__ import annotations

import torch

from cases import Path, make_fused, make_tree_batch, relative_error, run
from sglang_batchllm.attention.fused import choose_configs

if __name__ == "__main__":
    paths: list[Path] = [
        ([("a", 130), (i // 5, 70), (9 + i // 2, 33)], 1 + 3 * i) for i in range(30)
    ]
    paths += [([], 300), ([("a", 130)], 5), ([("b", 33)], 9), ([("b", 33)], 4)]
    batch = make_tree_batch(paths, 2, 4, 128, torch.bfloat16, device="cuda", padding=2)
    for config in choose_configs(torch.bfloat16, 128, 4):
        fused = make_fused(batch, config, num_programs=8)
        error = relative_error(run(fused, batch), batch.reference())
        torch.cuda.synchronize()
        print(f"relative error {error:.1e}")
        assert error < 1e-2
