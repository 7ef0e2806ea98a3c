"""SGLang's attention backend ``batchllm``: decode shares prefixes, the rest stays native.

Meant as ``--decode-attention-backend batchllm`` beside the native prefill backend: SGLang's
hybrid backend then sends prefill there and decode here, and mixed batches too (`mixed.py`).
Written against SGLang's ``base_attn_backend.py`` (the metadata protocol),
``radix_attention.py`` (the layer), ``model_executor/runner/decode_cuda_graph_runner.py`` (capture
and replay).
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_batchllm.attention.fused import FusedDecode, choose_configs
from sglang_batchllm.attention.groups import GroupTable, get_group_table
from sglang_batchllm.attention.reference import shared_decode
from sglang_batchllm.attention.worklist import BLOCKS, WorkList, WorkListConfig, next_power_of_2
from sglang_batchllm.edge import seams
from sglang_batchllm.edge.fusable import (
    decoding_layers,
    full_attention_pool,
    latent_dim,
    layer_refusal,
    model_refusal,
    window_of,
)
from sglang_batchllm.edge.mixed import MixedBatch, split_mixed
from sglang_batchllm.edge.names import ATTENTION_BACKEND

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_batchllm.edge.seams.v0_5_17 import attention as seam
else:
    seam = seams.load("attention")

logger = logging.getLogger(__name__)

INTERPRETED_PROGRAMS = 4
"""Programs of a launch on a machine without a GPU (TRITON_INTERPRET=1)."""


def create_batchllm_backend(model_runner: Any) -> AttentionBackend:
    """The factory for ``register_attention_backend("batchllm")``.

    Returns SGLang's own decode backend, with one warning, where nothing can be fused.
    """
    reason = model_refusal(model_runner)
    if reason is not None:
        logger.warning("batchllm attention: %s; decode uses SGLang's own backend", reason)
        return _build_native(model_runner)
    return BatchLLMAttnBackend(model_runner)


class BatchLLMAttnBackend(AttentionBackend):
    """Prefix-shared decode through the fused kernel; everything else through ``native``.

    ``native`` is a backend of our own only where something of ours goes through it: layers that can
    not be fused, or prefill where no other backend is given for it. Else it is what the hybrid
    backend prefills with, used for the prefill part of mixed batches (`share_prefill_backend`): a
    second one would take a workspace, and be planned, for nothing.

    The groups come from the ``GroupTable`` of the runner's request pool. The work list is built
    once a step, outside the captured graph, into buffers that the graph reads; what is shared
    is decided there on the device (`levels.py`), so a captured graph serves any mix.
    Requests without a group run through the same launch at the native kernel's speed.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token: torch.Tensor = self.req_to_token_pool.req_to_token
        self.device = self.req_to_token.device
        self.dtype: torch.dtype = model_runner.dtype
        # SGLang divides K and V by a layer's scales when it writes them, where the cache has
        # another type than they have: only there are they to be multiplied when they are read.
        pool = full_attention_pool(self.token_to_kv_pool)
        self.scales_kv = pool.dtype != self.dtype
        self.latent = latent_dim(pool)
        self.table = _table_of(self.req_to_token_pool)
        self.use_kernels = self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        self.num_rows = self.req_to_token.shape[0]
        self.fused: dict[tuple[int, int, int, int, int | None], FusedDecode] = {}
        refused: list[str] = []
        layers = decoding_layers(model_runner.model, pool)
        for layer in layers:
            reason = layer_refusal(layer, self.token_to_kv_pool)
            if reason is not None:
                refused.append(reason)
            elif self.use_kernels:
                self._fused_for(layer)
        # The native decode metadata costs host time each step: prepared only if a layer needs it.
        self.needs_native = bool(refused)
        # With latent attention the model computes other queries where a step prefills.
        self.takes_mixed = not refused and self.latent is None
        self.in_mixed_step = False  # `mixed.run_eagerly` says so
        self._native: AttentionBackend | None = None
        prefills = seam.prefill_backend(model_runner) in (None, ATTENTION_BACKEND)
        if refused or prefills:
            self._native = _build_native(model_runner)
        self._mixed: MixedBatch | None = None
        self.needs_cpu_seq_lens = self.needs_native and self.native.needs_cpu_seq_lens
        if refused:
            logger.warning(
                "batchllm attention: %d of %d layers use SGLang's own decode backend (%s)",
                len(refused),
                len(layers),
                ", ".join(sorted(set(refused))),
            )

    @property
    def native(self) -> AttentionBackend:
        assert self._native is not None, "prefill goes to the hybrid backend's own"
        return self._native

    def share_prefill_backend(self, backend: AttentionBackend) -> None:
        """Let mixed batches prefill through `backend`, unless there is one here already. It is
        not in use in such a step."""
        if self._native is None:
            self._native = backend

    # -- metadata ------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._mixed = None
        if self.in_mixed_step:
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
            self._build_list(fused.work, rows, seq_lens)

    def _build_list(self, work: WorkList, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        table = self.table
        work.build(
            rows, seq_lens, table.group_id, table.prefix_len, self.req_to_token, table.levels
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
            # Prefill may read K and V, and writing divides them in place.
            scaled = self.scales_kv and layer.k_scale is not None
            to_save = (k.clone(), v.clone()) if scaled else (k, v)
            self._save_kv(*to_save, layer, forward_batch)
        q = q.reshape(-1, layer.tp_q_head_num * layer.head_dim)  # some models have it in 4 axes
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
        """One token per request. q: [batch, query heads * head_dim]; returns [batch, query heads *
        v_head_dim]."""
        if self.needs_native and (
            layer_refusal(layer, self.token_to_kv_pool) is not None
            or any(value is not None for value in kwargs.values())
        ):
            if sinks is not None:
                kwargs["sinks"] = sinks
            return self.native.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache, **kwargs
            )
        self._refuse_unknown(kwargs)
        if save_kv_cache and k is not None:
            self._save_kv(k, v, layer, forward_batch)
        q = q.reshape(-1, layer.tp_q_head_num * layer.head_dim)  # some models have it in 4 axes
        out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
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
        scales = () if self.latent is not None else (layer.k_scale, layer.v_scale)
        loc = KVWriteLoc(forward_batch.out_cache_loc)
        self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, *scales)

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
        q = q.view(q.shape[0], layer.tp_q_head_num, layer.head_dim)
        out = out.view(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        k_scale, v_scale = self._kv_scales(layer)
        softcap = layer.logit_cap or 0.0
        if self.use_kernels:
            self._fused_for(layer)(
                q,
                k_cache,
                v_cache,
                out,
                self.req_to_token,
                layer.scaling,
                softcap,
                sinks,
                k_scale,
                v_scale,
            )
            return
        result = shared_decode(
            q,
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
            window_of(layer),
        )
        out.copy_(result * v_scale)

    def _kv_scales(self, layer: RadixAttention) -> tuple[float, float]:
        """What values in the cache are to be multiplied by, as host numbers."""
        if not self.scales_kv:
            return 1.0, 1.0
        k_scale, v_scale = layer.k_scale_float, layer.v_scale_float  # set with the tensors
        return (1.0 if k_scale is None else k_scale), (1.0 if v_scale is None else v_scale)

    # -- buffers -------------------------------------------------------------------------------

    def _fused_for(self, layer: RadixAttention) -> FusedDecode:
        rope_dim = layer.head_dim - layer.v_head_dim
        heads = layer.tp_q_head_num, layer.tp_k_head_num
        shape = (*heads, layer.v_head_dim, rope_dim, window_of(layer))
        if shape not in self.fused:
            self.fused[shape] = self._make_fused(*shape, self.num_rows)
        return self.fused[shape]

    def _make_fused(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_dim: int,
        window: int | None,
        max_batch: int,
    ) -> FusedDecode:
        ratio = num_heads // num_kv_heads
        lanes = next_power_of_2(ratio)
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            memory = card.shared_memory_per_multiprocessor
            configs = choose_configs(self.dtype, head_dim, ratio, memory, rope_dim)
            programs = [card.multi_processor_count * c.programs_per_sm for c in configs]
        else:
            configs = choose_configs(self.dtype, head_dim, ratio, rope_dim=rope_dim)
            programs = [INTERPRETED_PROGRAMS] * 2
        work = WorkList(
            WorkListConfig(
                num_kv_heads=num_kv_heads,
                lanes_small=configs.few.block_m_small // lanes,
                lanes_large=configs.few.block_m_large // lanes,
                num_programs=programs[0],
                many_programs=programs[1],
                window=window,
            ),
            max_batch=max(max_batch, self.num_rows),
            num_rows=self.num_rows,
            # A node that is not read together is copied once for each that is below it.
            slot_capacity=2 * int(full_attention_pool(self.token_to_kv_pool).size),
            device=self.device,
        )
        # Larger batches than are captured: compiled now, for a second or two, and not in the first
        # step that has so many.
        rows = torch.zeros(min(self.num_rows, BLOCKS[1] + 1), dtype=torch.int64, device=self.device)
        self._build_list(work, rows, torch.ones_like(rows))
        return FusedDecode(
            configs, work, num_heads, num_kv_heads, head_dim, self.dtype, self.device, rope_dim
        )


def _table_of(req_to_token_pool: Any) -> GroupTable:
    table = get_group_table(req_to_token_pool)
    assert table is not None
    return table


def _build_native(model_runner: Any) -> AttentionBackend:
    """The server's prefill backend once more, else SGLang's default choice."""
    name = seam.prefill_backend(model_runner)
    if name is None or name == ATTENTION_BACKEND:
        device = model_runner.req_to_token_pool.req_to_token.device
        if device.type != "cuda":
            name = "torch_native"
        else:
            name = "fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "triton"
    return ATTENTION_BACKENDS[name](model_runner)
