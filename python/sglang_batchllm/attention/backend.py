"""SGLang's attention backend ``batchllm``: decode shares prefixes, the rest stays native.

Meant as ``--decode-attention-backend batchllm`` beside the native prefill backend: SGLang's
hybrid backend then sends prefill there and decode here, and mixed batches too (`mixed.py`).
Written against
SGLang 0.5.17: ``base_attn_backend.py`` (the metadata protocol), ``radix_attention.py`` (the
layer), ``model_executor/runner/decode_cuda_graph_runner.py`` (capture and replay).
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_batchllm.attention.fused import FusedDecode, choose_config
from sglang_batchllm.attention.groups import GroupTable, get_group_table
from sglang_batchllm.attention.mixed import MixedBatch, split_mixed
from sglang_batchllm.attention.reference import shared_decode
from sglang_batchllm.attention.worklist import WorkList, WorkListConfig, next_power_of_2

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

BACKEND_NAME = "batchllm"
INTERPRETED_PROGRAMS = 4
"""Programs of a launch on a machine without a GPU (TRITON_INTERPRET=1)."""


def create_batchllm_backend(model_runner: Any) -> AttentionBackend:
    """The factory for ``register_attention_backend("batchllm")``.

    Returns SGLang's own decode backend, with one warning, where nothing can be fused.
    """
    native = ATTENTION_BACKENDS[_native_name(model_runner)](model_runner)
    reason = _model_refusal(model_runner)
    if reason is not None:
        logger.warning("batchllm attention: %s; decode uses SGLang's own backend", reason)
        return native
    return BatchLLMAttnBackend(model_runner, native)


class BatchLLMAttnBackend(AttentionBackend):
    """Prefix-shared decode through the fused kernel; everything else through ``native``.

    The groups come from the ``GroupTable`` of the runner's request pool. The work list is built
    once a step, outside the captured graph, into buffers that the graph reads; which groups share
    is decided there on the device (``MIN_SAVED_TOKENS``), so a captured graph serves any mix.
    Requests without a group run through the same launch at the native kernel's speed.
    """

    def __init__(self, model_runner: Any, native: AttentionBackend) -> None:
        super().__init__()
        self.native = native
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token: torch.Tensor = self.req_to_token_pool.req_to_token
        self.device = self.req_to_token.device
        self.dtype: torch.dtype = model_runner.dtype
        self.table = _table_of(self.req_to_token_pool)
        self.use_kernels = self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        self.num_rows = self.req_to_token.shape[0]
        self.fused: dict[tuple[int, int, int], FusedDecode] = {}
        refused: list[str] = []
        layers = _attention_layers(model_runner.model)
        for layer in layers:
            reason = _layer_refusal(layer)
            if reason is not None:
                refused.append(reason)
            elif self.use_kernels:
                self._fused_for(layer)
        # The native decode metadata costs host time each step: prepared only if a layer needs it.
        self.needs_native = bool(refused)
        self.takes_mixed = not refused
        self._mixed: MixedBatch | None = None
        self.needs_cpu_seq_lens = self.needs_native and native.needs_cpu_seq_lens
        if refused:
            logger.warning(
                "batchllm attention: %d of %d layers use SGLang's own decode backend (%s)",
                len(refused),
                len(layers),
                ", ".join(sorted(set(refused))),
            )

    # -- metadata ------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._mixed = None
        if forward_batch.forward_mode.is_mixed() and self.takes_mixed:
            self._mixed = split_mixed(forward_batch)
            if self._mixed.prefill is not None:
                self.native.init_forward_metadata(self._mixed.prefill)
            self._build_work(self._mixed.rows, self._mixed.seq_lens)
            return
        decode = forward_batch.forward_mode.is_decode_or_idle()
        if self.needs_native or not decode:
            self.native.init_forward_metadata(forward_batch)
        if decode:
            self._build_work(forward_batch.req_pool_indices, forward_batch.seq_lens)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        decode = forward_batch.forward_mode.is_decode_or_idle()
        if self.needs_native or not decode:
            self.native.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if decode:
            self._build_work(forward_batch.req_pool_indices, forward_batch.seq_lens)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        if self.needs_native or not forward_batch.forward_mode.is_decode_or_idle():
            self.native.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        if any(max_bs > fused.work.max_batch for fused in self.fused.values()):
            # Padding may reach beyond the request pool. Nothing is captured yet: buffers may move.
            shapes = list(self.fused)
            self.fused.clear()
            for shape in shapes:
                self.fused[shape] = self._make_fused(*shape, max_bs)
        if self.needs_native:
            self.native.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return self.native.get_cuda_graph_seq_len_fill_value() if self.needs_native else 1

    def on_after_cuda_graph_warmup(self) -> None:
        if self.needs_native:
            self.native.on_after_cuda_graph_warmup()

    def _build_work(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        # Outside the graph, and so before the event that lets the scheduler write req_to_token
        # again.
        if rows.numel() == 0:
            return
        for fused in self.fused.values():
            fused.work.build(
                rows, seq_lens, self.table.group_id, self.table.prefix_len, self.req_to_token
            )

    # -- attention -----------------------------------------------------------------------------

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Prefill through the native backend; of a mixed batch, the decoding part as decode."""
        mixed = self._mixed
        if mixed is None:
            return self.native.forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache, **kwargs
            )
        self._refuse_unknown(kwargs, known=("sinks",))
        if save_kv_cache and k is not None:
            self._save_kv(k, v, layer, forward_batch)
        q = q.reshape(q.shape[0], -1)
        out = q.new_empty(q.shape)
        tokens = mixed.tokens
        if mixed.prefill is not None:
            mixed.prefill._attn_output = out[:tokens]  # backends that know it write there
            prefilled = self.native.forward_extend(
                q[:tokens],
                k if k is None else k[:tokens],
                v if v is None else v[:tokens],
                layer,
                mixed.prefill,
                False,
                **kwargs,
            )
            if prefilled.data_ptr() != out.data_ptr():
                out[:tokens] = prefilled
        if mixed.rows.numel():
            self._decode(
                q[tokens:], out[tokens:], layer, mixed.rows, mixed.seq_lens, kwargs.get("sinks")
            )
        return out

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One token per request. q: [batch, query heads * head_dim]; returns the same shape."""
        if self.needs_native and (
            _layer_refusal(layer) is not None or any(value is not None for value in kwargs.values())
        ):
            if sinks is not None:
                kwargs["sinks"] = sinks
            return self.native.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache, **kwargs
            )
        self._refuse_unknown(kwargs)
        if save_kv_cache and k is not None:
            self._save_kv(k, v, layer, forward_batch)
        q = q.reshape(q.shape[0], -1)
        out = q.new_empty(q.shape)
        self._decode(q, out, layer, forward_batch.req_pool_indices, forward_batch.seq_lens, sinks)
        return out

    @staticmethod
    def _refuse_unknown(arguments: dict[str, Any], known: tuple[str, ...] = ()) -> None:
        unknown = sorted(
            name for name, value in arguments.items() if value is not None and name not in known
        )
        if unknown:
            raise RuntimeError(
                f"batchllm attention does not know the model's attention arguments {unknown}: "
                "start with --batchllm-attention native"
            )

    def _save_kv(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> None:
        self.token_to_kv_pool.set_kv_buffer(
            layer, KVWriteLoc(forward_batch.out_cache_loc), k, v, layer.k_scale, layer.v_scale
        )

    def _decode(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        layer: RadixAttention,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Write the attention of q [batch, query heads * head_dim] over the cache into out."""
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        shape = (q.shape[0], layer.tp_q_head_num, layer.head_dim)
        k_scale, v_scale = _kv_scales(layer)
        softcap = layer.logit_cap or 0.0
        if self.use_kernels:
            self._fused_for(layer)(
                q.view(shape),
                k_cache,
                v_cache,
                out.view(shape),
                self.req_to_token,
                layer.scaling,
                softcap,
                sinks,
                k_scale,
                v_scale,
            )
            return
        result = shared_decode(
            q.view(shape),
            k_cache,
            v_cache,
            self.req_to_token,
            rows,
            seq_lens,
            self.table.group_id,
            self.table.prefix_len,
            layer.scaling * k_scale,
            softcap,
            sinks,
        )
        out.view(shape).copy_(result * v_scale)

    # -- buffers -------------------------------------------------------------------------------

    def _fused_for(self, layer: RadixAttention) -> FusedDecode:
        shape = (layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim)
        if shape not in self.fused:
            self.fused[shape] = self._make_fused(*shape, self.num_rows)
        return self.fused[shape]

    def _make_fused(
        self, num_heads: int, num_kv_heads: int, head_dim: int, max_batch: int
    ) -> FusedDecode:
        ratio = num_heads // num_kv_heads
        lanes = next_power_of_2(ratio)
        config = choose_config(self.dtype, head_dim, ratio)
        num_programs = INTERPRETED_PROGRAMS
        if self.device.type == "cuda":
            sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            num_programs = sms * config.programs_per_sm
        work = WorkList(
            WorkListConfig(
                num_kv_heads=num_kv_heads,
                lanes_small=config.block_m_small // lanes,
                lanes_large=config.block_m_large // lanes,
                num_programs=num_programs,
            ),
            max_batch=max(max_batch, self.num_rows),
            num_rows=self.num_rows,
            slot_capacity=int(_full_attention_pool(self.token_to_kv_pool).size),
            device=self.device,
        )
        return FusedDecode(config, work, num_heads, num_kv_heads, head_dim, self.dtype, self.device)


def _table_of(req_to_token_pool: Any) -> GroupTable:
    table = get_group_table(req_to_token_pool)
    assert table is not None
    return table


def _attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def _full_attention_pool(pool: Any) -> Any:
    """The pool of the layers without a window (``SWAKVPool`` holds one beside the windowed one)."""
    return getattr(pool, "full_kv_pool", pool)


def _kv_scales(layer: RadixAttention) -> tuple[float, float]:
    """What values in the cache are to be multiplied by (fp8 KV with scales), as host numbers."""
    if layer.k_scale is None or layer.v_scale is None:
        return 1.0, 1.0
    k_scale, v_scale = layer.k_scale_float, layer.v_scale_float
    return (1.0 if k_scale is None else k_scale), (1.0 if v_scale is None else v_scale)


def _native_name(model_runner: Any) -> str:
    """The backend to fall back to: the server's prefill backend, else SGLang's default choice."""
    prefill, _ = model_runner.server_args.get_attention_backends()
    if prefill and prefill != BACKEND_NAME:
        return prefill
    device = model_runner.req_to_token_pool.req_to_token.device
    if device.type != "cuda":
        return "torch_native"
    return "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "triton"


def _layer_refusal(layer: RadixAttention) -> str | None:
    """Why a layer's decode can not be fused, or None."""
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return "sliding window"
    if layer.is_cross_attention:
        return "cross attention"
    if layer.attn_type == AttentionType.ENCODER_ONLY:
        return "encoder-only attention"
    if layer.v_head_dim != layer.head_dim or layer.head_dim > 256:
        return f"head dimensions {layer.head_dim} and {layer.v_head_dim}"
    if getattr(layer, "xai_temperature_len", -1) > 0:
        return "attention temperature"
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        return f"logit capping by {layer.logit_capping_method}"
    if layer.use_irope:
        return "chunked local attention"
    return None


def _model_refusal(model_runner: Any) -> str | None:
    """Why nothing of a model's decode can be fused, or None."""
    args = model_runner.server_args
    if model_runner.use_mla_backend:
        return "multi-head latent attention"
    if args.speculative_algorithm is not None:
        return "speculative decoding"
    if args.enable_deterministic_inference:
        return "deterministic inference (split sizes follow the batch)"
    if getattr(args, "dcp_size", 1) > 1:
        return "decode context parallelism"
    if model_runner.model_config.is_encoder_decoder:
        return "an encoder-decoder model"
    pool = _full_attention_pool(model_runner.token_to_kv_pool)
    # By name, not isinstance: the subclasses are other layouts, quantized or virtual.
    if type(pool).__name__ != "MHATokenToKVPool":
        return f"the KV pool {type(pool).__name__}"
    if pool.kv_cache_layout != "nhd":
        return f"the KV layout {pool.kv_cache_layout}"
    layers = _attention_layers(model_runner.model)
    if not layers:
        return "a model without attention layers"
    reasons = [_layer_refusal(layer) for layer in layers]
    if all(reason is not None for reason in reasons):
        return str(reasons[0])
    return None
