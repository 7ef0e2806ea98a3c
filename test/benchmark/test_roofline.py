"""The floor against the numbers of the design notes, and against sums done by hand."""

import numpy as np
import pytest

from batches import CASES, Case
from roofline import LLAMA_8B, Chip, ModelShape, floor
from shapes import SHAPES

DESIGN_FLOORS = {"M1": 109, "M2": 50, "M3": 59, "M4": 35, "M5": 56}
"""Requests per second."""


@pytest.mark.parametrize("name", DESIGN_FLOORS)
def test_the_floor_is_that_of_the_design_notes(name):
    case = CASES[name]
    assert case.requests / floor(case).seconds == pytest.approx(DESIGN_FLOORS[name], rel=0.03)


def test_memory_binds_no_tighter_than_the_batch():
    ample, scarce = floor(CASES["M1"]), floor(CASES["M6"])
    assert scarce.rows < ample.rows == CASES["M1"].requests
    assert scarce.steps > ample.steps
    assert scarce.prefill == pytest.approx(ample.prefill)
    assert ample.seconds < scarce.seconds


def test_a_single_request_by_hand():
    shape = ModelShape(1, 4, 8, 2, 1, 2, 10)
    assert shape.layer_weights == 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8
    assert shape.kv_bytes == 2 * 1 * 2 * 2
    case = Case("one", requests=1, sharing_degree=1, prefix=0, suffix=6, output=3)
    least = floor(case, shape, Chip(flops=1.0, bytes_per_second=1.0))
    assert least.prefill == 2 * (6 * shape.layer_weights + 40)
    assert least.attention == 6 * 6 / 2 * shape.pair_flops
    assert (least.steps, least.rows) == (2, 1)
    assert least.decode == 2 * 2 * (shape.layer_weights + 40)
    assert least.kv == ((6 + 1) + (6 + 2)) * shape.kv_bytes


def test_the_shape_is_read_from_a_config():
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    assert ModelShape.of(config) == LLAMA_8B


@pytest.mark.parametrize(
    "name, active, in_all, kv_bytes",
    [  # billions of weights as published, embeddings left out; bytes of KV per token that grow
        ("gpt-oss-20b", 3.6, 20.3, 12 * 2 * 8 * 64 * 2),
        ("gemma-3-12b", 11.8, 11.8, 8 * 2 * 8 * 256 * 2),
        ("qwen3-30b-a3b", 3.0, 30.2, 48 * 2 * 4 * 128 * 2),
        ("qwen3.5-9b", 7.5, 7.5, 8 * 2 * 4 * 256 * 2),
        ("deepseek-v2-lite", 2.4, 15.5, 27 * 576 * 2),
    ],
)
def test_published_shapes(name: str, active: float, in_all: float, kv_bytes: int):
    shape = ModelShape.of(SHAPES[name])
    assert (shape.layer_weights + shape.output_weights) / 1e9 == pytest.approx(active, rel=0.2)
    everything = shape.read_weights(np.array([1e9]))[0]
    assert everything / 1e9 == pytest.approx(in_all, rel=0.1)
    assert shape.kv_bytes == kv_bytes


def test_a_step_reads_the_experts_of_its_tokens():
    shape = ModelShape.of(SHAPES["qwen3-30b-a3b"])
    few, more, many = shape.read_weights(np.array([1, 16, 4096]))
    assert few == pytest.approx(shape.layer_weights + shape.output_weights)
    assert few < more < many
    assert many == pytest.approx(
        shape.attention_weights + shape.output_weights + 128 * shape.expert_weights
    )
