"""Which requests of a mixed batch go into which of its two passes, and what comes back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_batchllm.runtime.mixed import forward_in_parts, split_mixed

NEW_TOKENS = [5, 3, 1, 1, 1]
SEQ_LENS = [9, 3, 7, 4, 6]


def make_batch(mode: ForwardMode = ForwardMode.MIXED, new: list[int] = NEW_TOKENS) -> ForwardBatch:
    tokens = sum(new)
    lens = torch.tensor(SEQ_LENS[: len(new)])
    return ForwardBatch(
        forward_mode=mode,
        batch_size=len(new),
        input_ids=torch.arange(tokens),
        req_pool_indices=torch.arange(len(new)) + 10,
        seq_lens=lens,
        seq_lens_cpu=lens,
        out_cache_loc=torch.arange(tokens) + 100,
        seq_lens_sum=int(lens.sum()),
        positions=torch.arange(tokens) + 200,
        extend_num_tokens=tokens,
        extend_seq_lens=torch.tensor(new),
        extend_seq_lens_cpu=new,
        extend_prefix_lens_cpu=(lens - torch.tensor(new)).tolist(),
        lora_ids=[None] * len(new),  # type: ignore[list-item]
        mm_inputs=[None] * len(new),  # type: ignore[list-item]
    )


@pytest.fixture
def runner() -> Any:
    return SimpleNamespace(
        device="cpu",
        ps=SimpleNamespace(tp_size=1),
        prefill_cuda_graph_runner=None,
        war_fastpath_read_done_event="read",
        passes=[],
    )


def stock_forward(runner: Any, batch: ForwardBatch, scale: int) -> Any:
    """Logits that name the request and its last token."""
    runner.passes.append(batch.forward_mode)
    logits = torch.stack([batch.req_pool_indices, batch.seq_lens], 1) * scale
    return SimpleNamespace(
        logits_output=SimpleNamespace(next_token_logits=logits), can_run_graph=True
    )


def test_both_parts_have_what_is_theirs() -> None:
    batch = make_batch()
    prefill, decode = split_mixed(batch)
    assert prefill is not None and decode is not None
    assert (prefill.forward_mode, decode.forward_mode) == (ForwardMode.EXTEND, ForwardMode.DECODE)
    assert (prefill.batch_size, decode.batch_size) == (2, 3)
    assert (prefill.extend_num_tokens, prefill.extend_seq_lens_cpu) == (8, [5, 3])
    assert decode.extend_seq_lens_cpu is None and decode.extend_prefix_lens_cpu is None
    assert (prefill.seq_lens_sum, decode.seq_lens_sum) == (12, 17)
    for name in ("input_ids", "positions", "out_cache_loc", "req_pool_indices", "seq_lens"):
        parts = torch.cat([getattr(prefill, name), getattr(decode, name)])
        assert torch.equal(parts, getattr(batch, name)), name
    assert decode.input_ids.tolist() == [8, 9, 10]
    assert batch.batch_size == 5 and batch.forward_mode.is_mixed()


def test_logits_come_back_in_the_order_of_the_batch(runner: Any) -> None:
    batch = make_batch()
    output = forward_in_parts(stock_forward, runner, batch, 3)  # type: ignore[arg-type]
    whole = stock_forward(runner, batch, 3)
    logits = output.logits_output.next_token_logits  # type: ignore[union-attr]
    assert torch.equal(logits, whole.logits_output.next_token_logits)
    assert runner.passes[:2] == [ForwardMode.DECODE, ForwardMode.EXTEND]
    # The scheduler must wait for the whole of both, not for the decode graph's inputs alone.
    assert runner.war_fastpath_read_done_event is None and not output.can_run_graph


@pytest.mark.parametrize(
    ("new", "mode"), [([1, 1, 1], ForwardMode.DECODE), ([4, 2], ForwardMode.EXTEND)]
)
def test_a_part_that_is_empty_is_left_out(runner: Any, new: list[int], mode: ForwardMode) -> None:
    forward_in_parts(stock_forward, runner, make_batch(new=new), 1)  # type: ignore[arg-type]
    assert runner.passes == [mode]


@pytest.mark.parametrize(
    "change",
    [
        {"forward_mode": ForwardMode.EXTEND},
        {"return_logprob": True},
        {"lora_ids": [None, "adapter", None, None, None]},
        {"mm_inputs": [None, object(), None, None, None]},
        {"mrope_positions": torch.zeros(3, 11)},
    ],
)
def test_what_can_not_be_divided_stays_whole(runner: Any, change: dict[str, Any]) -> None:
    batch = make_batch()
    for name, value in change.items():
        setattr(batch, name, value)
    forward_in_parts(stock_forward, runner, batch, 1)  # type: ignore[arg-type]
    assert runner.passes == [batch.forward_mode]
    assert runner.war_fastpath_read_done_event == "read"
