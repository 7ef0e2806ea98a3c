from __future__ import annotations

import torch

from cases import Path, make_batch, make_tree_batch, relative_error
from sglang_batchllm.attention.reference import shared_decode


def test_sharing_changes_nothing() -> None:
    paths: list[Path] = [([("a", 70), (i // 3, 4), (i // 2 + 9, 5)], 1 + i) for i in range(12)]
    paths += [([], 90), ([("b", 33)], 9)] + [([("c", 5)], 3)] * 40
    batch = make_tree_batch(paths, padding=2)
    for softcap, sinks, window in ((0.0, None, None), (2.0, torch.randn(4), None), (0.0, None, 12)):
        out = shared_decode(
            batch.q,
            batch.k_cache,
            batch.v_cache,
            batch.req_to_token,
            batch.rows,
            batch.seq_lens,
            batch.group_id,
            batch.prefix_len,
            batch.scale,
            softcap,
            sinks,
            window,
        )
        expected = batch.reference(softcap=softcap, sinks=sinks, window=window)
        assert relative_error(out, expected) < 1e-5


def test_a_window_is_the_last_tokens() -> None:
    batch = make_batch([(0, [12])])
    last = make_batch([(0, [12])])
    last.req_to_token = batch.req_to_token[:, 7:]
    last.seq_lens = batch.seq_lens - 7
    torch.testing.assert_close(batch.reference(window=5), last.reference())


def test_reference_is_softmax_attention() -> None:
    batch = make_batch([(0, [12])], num_kv_heads=2, ratio=2)
    slots = batch.req_to_token[batch.rows[0], :12].long()
    k, v = batch.k_cache[slots].transpose(0, 1), batch.v_cache[slots].transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        batch.q[0].view(2, 2, 16).double(), k.double(), v.double()
    )
    torch.testing.assert_close(batch.reference()[0], expected.view(4, 16))
