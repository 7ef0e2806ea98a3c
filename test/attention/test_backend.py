"""The backend beside SGLang's torch_native on the CPU: what is fused and what falls back."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache import memory_pool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from cases import Batch, make_batch, relative_error
from sglang_batchllm.attention import get_group_table
from sglang_batchllm.attention.reference import reference_decode
from sglang_batchllm.edge.attention_backend import BatchLLMAttnBackend, create_batchllm_backend
from sglang_batchllm.edge.fusable import model_refusal
from sglang_batchllm.edge.mixed import run_eagerly, select_backend, split_mixed

HEADS, KV_HEADS, DIM = 4, 2, 16


class MHATokenToKVPool:
    """As much of SGLang's pool as a backend touches."""

    kv_cache_layout = "nhd"
    is_quantized_kv_cache = False

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v, self.size, self.dtype = k, v, k.shape[0], k.dtype

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v

    def set_kv_buffer(
        self,
        layer: RadixAttention,
        loc: Any,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: object = None,
        v_scale: object = None,
    ) -> None:
        self.k[loc.loc] = k.view(-1, KV_HEADS, DIM)
        self.v[loc.loc] = v.view(-1, KV_HEADS, DIM)


class Pool:
    def __init__(self, req_to_token: torch.Tensor) -> None:
        self.req_to_token = req_to_token


def make_layer(**options: Any) -> RadixAttention:
    return RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, 0, **options)


def make_runner(batch: Batch, layers: list[RadixAttention], **flags: Any) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(
            get_attention_backends=lambda: (flags.get("prefill", "torch_native"), "batchllm"),
            prefill_attention_backend=flags.get("prefill", "torch_native"),
            decode_attention_backend="batchllm",
            attention_backend=None,
            speculative_algorithm=flags.get("speculative_algorithm"),
            enable_deterministic_inference=False,
            dcp_size=1,
        ),
        model_config=SimpleNamespace(is_encoder_decoder=False),
        model=torch.nn.ModuleList(layers),
        req_to_token_pool=Pool(batch.req_to_token),
        token_to_kv_pool=_pool(flags.get("pool", "MHATokenToKVPool"), batch),
        dtype=batch.q.dtype,
        device="cpu",
    )


def _pool(name: str, batch: Batch) -> Any:
    return type(name, (MHATokenToKVPool,), {})(batch.k_cache, batch.v_cache)


def make_step(batch: Batch, mode: ForwardMode = ForwardMode.DECODE) -> Any:
    """The batch's last token is the one that this step writes."""
    last = batch.req_to_token[batch.rows, batch.seq_lens - 1].long()
    return SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=batch.rows,
        seq_lens=batch.seq_lens,
        encoder_lens=None,
        out_cache_loc=last,
        batch_size=len(batch.rows),
    )


def decode(backend: Any, layer: RadixAttention, batch: Batch, **kwargs: Any) -> torch.Tensor:
    step = make_step(batch)
    k, v = batch.k_cache[step.out_cache_loc], batch.v_cache[step.out_cache_loc]
    batch.k_cache[step.out_cache_loc] = torch.nan
    backend.init_forward_metadata(step)
    out = backend.forward_decode(batch.q.flatten(1), k, v, layer, step, **kwargs)
    return out.view(batch.q.shape)


def make(batch: Batch, layers: list[RadixAttention], **flags: Any) -> Any:
    return make_from(make_runner(batch, layers, **flags), batch)


def make_from(runner: Any, batch: Batch) -> Any:
    table = get_group_table(runner.req_to_token_pool)
    assert table is not None
    columns = zip(batch.group_id.T.tolist(), batch.prefix_len.T.tolist(), strict=True)
    paths = [[node for node in zip(ids, ends, strict=True) if node[0] > 0] for ids, ends in columns]
    table.assign(list(range(len(paths))), paths)
    return create_batchllm_backend(runner)


@pytest.fixture
def batch() -> Batch:
    return make_batch([(300, [1, 7, 30]), (0, [90]), (33, [9])], KV_HEADS, HEADS // KV_HEADS, DIM)


def test_decode_with_groups(batch: Batch) -> None:
    layer = make_layer()
    backend = make(batch, [layer])
    assert isinstance(backend, BatchLLMAttnBackend)
    out = decode(backend, layer, batch)
    assert relative_error(out, batch.reference()) < 1e-5
    native = decode(TorchNativeAttnBackend(make_runner(batch, [layer])), layer, batch)
    torch.testing.assert_close(out, native, rtol=1e-4, atol=1e-5)


def test_softcap_and_sinks(batch: Batch) -> None:
    layer = make_layer(logit_cap=3.0)
    sinks = torch.randn(HEADS)
    out = decode(make(batch, [layer]), layer, batch, sinks=sinks)
    assert relative_error(out, batch.reference(softcap=3.0, sinks=sinks)) < 1e-5


def test_sliding_windows(batch: Batch) -> None:
    full, window = make_layer(), make_layer(sliding_window_size=39)
    backend = make(batch, [full, window])
    assert not backend.needs_native
    assert relative_error(decode(backend, full, batch), batch.reference()) < 1e-5
    assert relative_error(decode(backend, window, batch), batch.reference(window=40)) < 1e-5


def test_sliding_windows_in_a_pool_of_their_own_are_native(
    batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    full, window = make_layer(), make_layer(sliding_window_size=4)
    runner = make_runner(batch, [full, window])
    runner.token_to_kv_pool.full_kv_pool = make_runner(batch, []).token_to_kv_pool
    with caplog.at_level(logging.WARNING):
        backend = make_from(runner, batch)
    assert [r.message for r in caplog.records if "1 of 2 layers" in r.message]
    assert relative_error(decode(backend, full, batch), batch.reference()) < 1e-5
    expected = decode(backend.native, window, batch)
    assert torch.equal(decode(backend, window, batch), expected)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"pool": "MHATokenToKVPoolFP4"}, "FP4"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
    ],
)
def test_refused_models_get_the_native_backend(
    batch: Batch, flags: dict[str, Any], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backend = make(batch, [make_layer()], **flags)
    assert isinstance(backend, TorchNativeAttnBackend)
    assert len([r for r in caplog.records if word in r.message]) == 1


LATENT, ROPE = 32, 16


class MLATokenToKVPool:
    """As much of SGLang's pool of latents as a backend touches."""

    kv_lora_rank = LATENT

    def __init__(self, kv: torch.Tensor) -> None:
        self.kv, self.size, self.dtype = kv, kv.shape[0], kv.dtype

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kv, self.kv[..., :LATENT]

    def set_kv_buffer(
        self, layer: RadixAttention, loc: Any, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.kv[loc.loc] = k


def latent_runner(batch: Batch, heads: int = HEADS) -> Any:
    decoding = RadixAttention(heads, LATENT + ROPE, 0.2, 1, 0, v_head_dim=LATENT)
    prefilling = RadixAttention(heads, 24, 0.2, heads, 0, v_head_dim=16)
    runner = make_runner(batch, [decoding, prefilling])
    runner.token_to_kv_pool = MLATokenToKVPool(batch.k_cache)
    return runner


def test_latent_attention() -> None:
    batch = make_batch([(40, [1, 7, 9]), (0, [30])], 1, HEADS, LATENT, rope_dim=ROPE)
    runner = latent_runner(batch)
    backend = make_from(runner, batch)
    assert isinstance(backend, BatchLLMAttnBackend)
    assert not backend.needs_native and not backend.takes_mixed
    step = make_step(batch)
    k = batch.k_cache[step.out_cache_loc]
    expected = reference_decode(
        batch.q, batch.k_cache, batch.v_cache, batch.req_to_token, batch.rows, batch.seq_lens, 0.2
    )
    batch.k_cache[step.out_cache_loc] = torch.nan
    backend.init_forward_metadata(step)
    out = backend.forward_decode(batch.q.flatten(1), k, k, runner.model[0], step)
    assert relative_error(out.view(expected.shape), expected) < 1e-5


def test_latent_attention_is_native_where_sharing_gains_nothing() -> None:
    batch = make_batch([(2, [1, 1])], 1, 64, LATENT, rope_dim=ROPE)
    assert "64 query heads" in (model_refusal(latent_runner(batch, heads=64)) or "")
    runner = latent_runner(batch)
    runner.server_args.attention_backend = "trtllm_mla"
    assert "trtllm_mla" in (model_refusal(runner) or "")
    runner = latent_runner(batch)
    runner.token_to_kv_pool.dtype = torch.float8_e4m3fn
    assert "float8_e4m3fn" in (model_refusal(runner) or "")


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False)])
def test_numbers_that_the_card_does_not_have(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([(2, [1, 1])], KV_HEADS, 2, DIM, kv_dtype=torch.float8_e4m3fn)
    runner = make_runner(batch, [make_layer()])
    runner.req_to_token_pool.req_to_token = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = model_refusal(runner)
    assert (reason is not None and "compute capability 8.0" in reason) == refused


def test_unknown_arguments_are_refused(batch: Batch) -> None:
    layer = make_layer()
    with pytest.raises(RuntimeError, match="rel_bias"):
        decode(make(batch, [layer]), layer, batch, rel_bias=torch.zeros(1))


def test_extend_is_the_native_backend(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``--attention-backend batchllm`` has it: no hybrid backend, and so no other prefill."""
    layer = make_layer()
    backend = make(batch, [layer], prefill="batchllm")
    assert isinstance(backend.native, TorchNativeAttnBackend)
    seen: list[Any] = []
    monkeypatch.setattr(backend.native, "forward_extend", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setattr(backend.native, "init_forward_metadata", seen.append)
    step = make_step(batch, ForwardMode.EXTEND)
    backend.init_forward_metadata(step)
    backend.forward_extend(batch.q, batch.q, batch.q, layer, step, True, sinks=None)
    assert seen[0] is step and seen[1][0][4] is step


def test_mixed_batches_share_in_their_decoding_part(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer()
    backend = make(batch, [layer])
    backend.share_prefill_backend(TorchNativeAttnBackend(make_runner(batch, [layer])))
    step, q = make_mixed_step(batch)
    slots = step.out_cache_loc
    k, v = batch.k_cache[slots], batch.v_cache[slots]
    expected = backend.native.forward_extend(q.flatten(1), k, v, layer, step)
    batch.k_cache[slots] = torch.nan
    decoded: list[int] = []
    decode_part = backend._decode
    monkeypatch.setattr(
        backend, "_decode", lambda q, *a: (decoded.append(len(q)), decode_part(q, *a))
    )
    backend.in_mixed_step = True
    backend.init_forward_metadata(step)
    out = backend.forward_extend(q.flatten(1), k, v, layer, step)
    assert decoded == [len(step.seq_lens) - 2]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_what_decodes_in_a_mixed_batch_lies_aligned(batch: Batch) -> None:
    """Else Triton compiles the work list's kernels anew, in the middle of a batch."""
    step, _ = make_mixed_step(batch)
    step.extend_seq_lens_cpu[1:3] = [3, 2]  # so that three prefill
    mixed = split_mixed(step)
    assert len(mixed.rows) == len(step.seq_lens) - 3
    for values in (mixed.rows, mixed.seq_lens):
        assert values.data_ptr() % 16 == 0


def make_mixed_step(batch: Batch) -> tuple[Any, torch.Tensor]:
    """Two requests prefill 5 and 3 tokens, the others decode; and queries for them."""
    rows, lens = batch.rows, batch.seq_lens
    order = torch.argsort(lens, descending=True)  # the two longest, in different groups or not
    rows, lens = rows[order], lens[order]
    new = [5, 3] + [1] * (len(rows) - 2)
    slots = torch.cat(
        [batch.req_to_token[r, n - m : n] for r, n, m in zip(rows, lens, new, strict=True)]
    ).long()
    q = torch.randn(len(slots), HEADS, DIM)
    step = SimpleNamespace(
        forward_mode=ForwardMode.MIXED,
        batch_size=len(rows),
        req_pool_indices=rows,
        seq_lens=lens,
        seq_lens_cpu=lens,
        extend_seq_lens=torch.tensor(new),
        extend_seq_lens_cpu=new,
        extend_prefix_lens=lens - torch.tensor(new),
        extend_prefix_lens_cpu=(lens - torch.tensor(new)).tolist(),
        encoder_lens=None,
        out_cache_loc=slots,
    )
    return step, q


@pytest.mark.parametrize(
    ("cache_dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float8_e4m3fn, 2e-1)],
)
def test_kv_scales_count_where_writing_divided(
    batch: Batch, cache_dtype: torch.dtype, tolerance: float
) -> None:
    """SGLang's pool divides only what it converts; a float32 model's cache may be float32."""
    backend, layer = make_scaled(batch, cache_dtype)
    expected = batch.reference()
    out = decode(backend, layer, batch)
    assert relative_error(out, expected) < tolerance


def test_prefill_of_a_mixed_batch_sees_k_and_v_as_they_are(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, layer = make_scaled(batch, torch.float8_e4m3fn)
    backend.share_prefill_backend(TorchNativeAttnBackend(make_runner(batch, [layer])))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        backend.native, "forward_extend", lambda q, k, v, *a, **kw: (seen.extend((k, v)), q)[1]
    )
    step, q = make_mixed_step(batch)
    k, v = torch.randn(2, len(q), KV_HEADS, DIM)
    k_before, v_before = k[:8].clone(), v[:8].clone()
    backend.in_mixed_step = True
    backend.init_forward_metadata(step)
    backend.forward_extend(q.flatten(1), k, v, layer, step)
    assert torch.equal(seen[0], k_before) and torch.equal(seen[1], v_before)


def make_scaled(batch: Batch, cache_dtype: torch.dtype) -> tuple[Any, RadixAttention]:
    """A backend over SGLang's own pool, which the batch was written to with scales."""
    layer = make_layer()
    layer.k_scale = torch.nn.Parameter(torch.tensor(0.25), requires_grad=False)
    layer.v_scale = torch.nn.Parameter(torch.tensor(4.0), requires_grad=False)
    layer.k_scale_float, layer.v_scale_float = 0.25, 4.0
    slots = len(batch.k_cache)
    runner = make_runner(batch, [layer])
    pool = memory_pool.MHATokenToKVPool(
        slots, 1, cache_dtype, KV_HEADS, DIM, 1, "cpu", enable_memory_saver=False
    )
    pool.set_kv_buffer(
        layer,
        memory_pool.KVWriteLoc(torch.arange(slots)),
        batch.k_cache.clone(),
        batch.v_cache.clone(),
        layer.k_scale,
        layer.v_scale,
    )
    runner.token_to_kv_pool = pool
    return make_from(runner, batch), layer


def test_a_native_backend_is_built_only_where_it_is_used(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(runner: Any) -> Any:
        built.append("native")
        return TorchNativeAttnBackend(runner)

    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", build)
    backend = make(batch, [make_layer()])
    decode(backend, make_layer(), batch)
    prefill = TorchNativeAttnBackend(make_runner(batch, []))
    hybrid = SimpleNamespace(decode_backend=backend, prefill_backend=prefill)
    assert run_step(hybrid, ForwardMode.MIXED) is backend
    assert backend.native is prefill
    assert not built
    own = make(batch, [make_layer(), make_layer(is_cross_attention=True)])
    assert built == ["native"]
    own.share_prefill_backend(prefill)
    assert own.native is not prefill


def backend_of_step(runner: Any, batch: Any) -> Any:
    """The one that the layers of a step go to, once SGLang has named its mode anew."""
    return select_backend(
        lambda hybrid, mode: hybrid.prefill_backend,
        runner.model_runner.attn_backend,
        ForwardMode.EXTEND,
    )


def run_step(hybrid: Any, mode: ForwardMode) -> Any:
    runner = SimpleNamespace(model_runner=SimpleNamespace(attn_backend=hybrid))
    return run_eagerly(backend_of_step, runner, SimpleNamespace(forward_mode=mode))  # type: ignore[arg-type]


def test_hybrid_backends_send_mixed_batches_to_the_sharing_one() -> None:
    shared: list[str] = []
    sharing = SimpleNamespace(takes_mixed=True, share_prefill_backend=shared.append)
    hybrid = SimpleNamespace(decode_backend=sharing, prefill_backend="prefill")
    assert run_step(hybrid, ForwardMode.MIXED) is sharing
    assert shared == ["prefill"]
    assert run_step(hybrid, ForwardMode.EXTEND) == "prefill"
    sharing.takes_mixed = False
    assert run_step(hybrid, ForwardMode.MIXED) == "prefill"
