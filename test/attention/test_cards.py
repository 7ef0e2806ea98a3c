"""The kernels compiled for cards that this machine does not have: what they need, the card has."""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import pytest
import torch
from triton.runtime import driver

from cards import CARDS, REGISTERS, RESERVED, Driver
from cases import make_batch, make_fused
from conftest import INTERPRETED
from sglang_batchllm.attention.fused import choose_configs
from sglang_batchllm.attention.worklist import BLOCKS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

EVERY = os.environ.get("ALL_CARDS") == "1"


class Heads(NamedTuple):
    """A model's attention."""

    kv_heads: int
    ratio: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    softcap: float = 0.0
    sinks: bool = False
    rope_dim: int = 0
    window: int | None = None


HEADS = {
    "llama": Heads(8, 4, 128),
    "llama, e4m3": Heads(8, 4, 128, kv_dtype=torch.float8_e4m3fn),
    "llama, e5m2": Heads(8, 4, 128, kv_dtype=torch.float8_e5m2),
    "gpt-oss": Heads(8, 8, 64, sinks=True),
    "gemma": Heads(4, 2, 256, softcap=50.0),
    "gemma, window": Heads(8, 2, 256, window=1024),
    "qwen3.5": Heads(4, 4, 256),
    "phi": Heads(32, 1, 80, dtype=torch.float16),
    "falcon": Heads(1, 71, 64),
    "most of all": Heads(1, 64, 256),
    "deepseek": Heads(1, 16, 512, rope_dim=64),
    "deepseek, more heads": Heads(1, 32, 512, rope_dim=64),
    "float32": Heads(8, 4, 128, dtype=torch.float32),
    "float32, large": Heads(1, 16, 256, dtype=torch.float32),
}
MOST_TELLING = [
    ("A100", "llama"),
    ("L4, L40S, RTX 4090", "llama"),
    ("L4, L40S, RTX 4090", "most of all"),
    ("H100, H200", "llama"),
    ("H100, H200", "deepseek"),
    ("B200", "llama, e4m3"),
]
MOST_TELLING_LISTS = [("L4, L40S, RTX 4090", 4096)]
NOT_OF_THE_CARD = [
    ("A100", "llama, e4m3"),
    *itertools.product(("L4, L40S, RTX 4090", "B200"), ("deepseek", "deepseek, more heads")),
]
"""Refused before (`edge/fusable.py`): Triton knows no such numbers there, or takes more memory."""


def cases() -> list[object]:
    return [
        pytest.param(
            *case,
            marks=pytest.mark.skipif(
                not EVERY and case not in MOST_TELLING, reason="takes minutes; ALL_CARDS=1 runs it"
            ),
        )
        for case in ((card, heads) for card in CARDS for heads in HEADS)
        if case not in NOT_OF_THE_CARD
    ]


@pytest.mark.parametrize(("card_name", "heads_name"), cases())
def test_kernels_fit_the_card(
    card_name: str, heads_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, heads = CARDS[card_name], HEADS[heads_name]
    stub = Driver(card)
    monkeypatch.setattr(driver, "_active", stub)
    batch = make_batch(
        [(3, [1, 2])],
        heads.kv_heads,
        heads.ratio,
        heads.dim,
        heads.dtype,
        heads.kv_dtype,
        rope_dim=heads.rope_dim,
    )
    configs = choose_configs(
        heads.dtype, heads.dim, heads.ratio, card.per_multiprocessor, heads.rope_dim
    )
    for config in dict.fromkeys(configs):
        fused = make_fused(
            batch, config, num_programs=100 * config.programs_per_sm, window=heads.window
        )
        fused(
            batch.q,
            batch.k_cache,
            batch.v_cache,
            torch.empty_like(batch.q[..., : heads.dim]),
            batch.req_to_token,
            batch.scale,
            heads.softcap,
            torch.zeros(heads.kv_heads * heads.ratio) if heads.sinks else None,
        )
        kernel = stub.compiled["fused_decode_kernel"].pop()
        programs = config.programs_per_sm
        assert programs * (kernel.shared + RESERVED) <= card.per_multiprocessor
        registers = kernel.registers or 255
        assert programs * kernel.warps * 32 * registers <= REGISTERS
    assert not stub.compiled["fused_decode_kernel"]


@pytest.mark.parametrize("requests", BLOCKS)
@pytest.mark.parametrize("card_name", CARDS)
def test_the_work_list_fits_the_card(
    card_name: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not EVERY and (card_name, requests) not in MOST_TELLING_LISTS:
        pytest.skip("takes minutes; ALL_CARDS=1 runs it")
    stub = Driver(CARDS[card_name])
    monkeypatch.setattr(driver, "_active", stub)
    batch = make_batch([(0, [1] * requests)], num_kv_heads=1, ratio=1)
    work = make_fused(batch).work
    work.build(
        batch.rows,
        batch.seq_lens,
        batch.group_id,
        batch.prefix_len,
        batch.req_to_token,
        batch.levels,
    )
    assert stub.compiled.keys() == {"plan_kernel", "_emit_kernel"}
