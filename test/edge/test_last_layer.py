"""The last layer, for sampled tokens only: what its hooks let through, and when."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)

from sglang_batchllm.edge import seams
from sglang_batchllm.edge.last_layer import (
    KNOWN_LAYERS,
    sample_rows_in_last_layer,
    sampled_rows,
)

try:  # where layers keep the residual beside the batch
    from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
    from sglang.srt.layers.layer_boundary.residual.batch import stream_of
    from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
except ImportError:
    stream_of = None

HIDDEN = 8
LENGTHS = [3, 1, 5]
LAST = [2, 3, 8]


class Norm(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = hidden + residual
        return total / total.norm(dim=-1, keepdim=True), total


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.o_proj(hidden.cumsum(0))


class Layer(torch.nn.Module):
    """The shape of the layers in KNOWN_LAYERS; counts the rows that its MLP sees."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.post_attention_layernorm = Norm()
        self.mlp = torch.nn.Linear(HIDDEN, HIDDEN)
        self.mlp_rows = 0

    def forward(
        self, positions: Any, hidden: torch.Tensor, batch: ForwardBatch, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.self_attn(hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        self.mlp_rows = hidden.shape[0]
        return self.mlp(hidden), residual


class StreamLayer(Layer):
    """The same with the residual beside the batch."""

    def forward(self, positions: Any, hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:  # type: ignore[override]
        assert stream_of is not None
        stream = stream_of(batch)
        hidden = self.self_attn(hidden)
        hidden, residual = self.post_attention_layernorm(hidden, stream.residual)
        stream.write(residual)
        self.mlp_rows = hidden.shape[0]
        return stream.record(self.mlp(hidden), PLAIN_ADD)


def make_layer() -> Layer:
    return Layer() if stream_of is None else StreamLayer()


def hook(layer: Layer) -> None:
    seams.load("last_layer").SampledRows(layer, sampled_rows)


def prefill(lengths: list[int], **changes: Any) -> ForwardBatch:
    batch = ForwardBatch.__new__(ForwardBatch)
    batch.forward_mode = ForwardMode.EXTEND
    batch.input_ids = torch.zeros(sum(lengths), dtype=torch.int64)
    batch.extend_seq_lens = torch.tensor(lengths, dtype=torch.int32)
    batch.extend_seq_lens_cpu = lengths
    batch.extend_logprob_start_lens_cpu = lengths
    batch.capture_hidden_mode = CaptureHiddenMode.NULL
    batch.return_logprob = False
    batch.multi_item_delimiter_indices = None
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


def run(layer: Layer, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = batch.input_ids.shape[0]
    hidden, residual = torch.randn(2, tokens, HIDDEN, generator=generator)
    with torch.no_grad():
        if stream_of is None:
            return layer(None, hidden, batch, residual)
        batch.residual_stream = ResidualStream(residual)
        return stream_of(batch).export(layer(None, hidden, batch))


def test_sampled_rows_are_as_without_hooks_and_the_others_never_reach_the_mlp() -> None:
    torch.manual_seed(0)
    layer = make_layer()
    whole = run(layer, prefill(LENGTHS))
    assert layer.mlp_rows == sum(LENGTHS)
    hook(layer)
    for _ in range(2):
        sampled = run(layer, prefill(LENGTHS))
        assert layer.mlp_rows == len(LENGTHS)
        for before, after in zip(whole, sampled, strict=True):
            assert after.shape == before.shape
            torch.testing.assert_close(after[LAST], before[LAST])


@pytest.mark.parametrize(
    "changes",
    [
        {"forward_mode": ForwardMode.DECODE, "extend_seq_lens": None},
        {"capture_hidden_mode": CaptureHiddenMode.FULL},
        {"multi_item_delimiter_indices": [torch.tensor([1])]},
        {"return_logprob": True, "extend_logprob_start_lens_cpu": [0, 0, 0]},
    ],
)
def test_whoever_reads_more_than_the_logits_gets_every_row(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = make_layer()
    whole = run(layer, prefill(LENGTHS))
    hook(layer)
    run(layer, prefill(LENGTHS))
    everything = run(layer, prefill(LENGTHS, **changes))
    assert layer.mlp_rows == sum(LENGTHS)
    for before, after in zip(whole, everything, strict=True):
        torch.testing.assert_close(after, before)


def test_logprobs_of_outputs_need_the_last_rows_only() -> None:
    rows = sampled_rows(prefill(LENGTHS, return_logprob=True))
    assert rows is not None
    assert rows.tolist() == LAST
    assert sampled_rows(prefill([1, 1, 1])) is None


def test_logprobs_of_a_prompt_need_its_rows_from_their_start_on() -> None:
    starts = [3, 0, 2]
    batch = prefill(LENGTHS, return_logprob=True, extend_logprob_start_lens_cpu=starts)
    rows = sampled_rows(batch)
    assert rows is not None
    assert rows.tolist() == [2, 3, 6, 7, 8]
    torch.manual_seed(0)
    layer = make_layer()
    whole = run(layer, batch)
    hook(layer)
    for before, after in zip(whole, run(layer, batch), strict=True):
        torch.testing.assert_close(after[rows], before[rows])
    assert layer.mlp_rows == len(rows)


def test_other_layers_and_lora_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hooks_of(layer: Layer, **flags: Any) -> int:
        graphs = SimpleNamespace(prefill=SimpleNamespace(backend=flags.pop("graphs", "breakable")))
        args: Any = SimpleNamespace(
            **{"enable_lora": False, "enable_torch_compile": False, "tp_size": 1} | flags,
            cuda_graph_config=graphs,
        )
        model = torch.nn.Module()
        model.model = torch.nn.Module()
        model.model.layers = torch.nn.ModuleList([make_layer(), layer])
        sample_rows_in_last_layer(model, args)
        return len(layer._forward_hooks)

    assert hooks_of(make_layer()) == 0
    kind = type(make_layer())
    name = f"{kind.__module__}.{kind.__qualname__}"
    monkeypatch.setattr("sglang_batchllm.edge.last_layer.KNOWN_LAYERS", KNOWN_LAYERS | {name})
    assert hooks_of(make_layer()) == 1
    assert hooks_of(make_layer(), enable_lora=True) == 0
    assert hooks_of(make_layer(), enable_torch_compile=True) == 0
    assert hooks_of(make_layer(), graphs="tc_piecewise") == 0
    fused = make_layer()
    fused.layer_communicator = object()  # type: ignore[assignment]
    assert hooks_of(fused, tp_size=2) == 0
