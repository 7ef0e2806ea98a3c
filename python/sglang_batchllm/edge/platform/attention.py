"""Attention of the CPU reference platform."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

NO_WINDOW = -1


class CpuAttention(TorchNativeAttnBackend):
    """SGLang's ``torch_native``, which knows no attention sinks and no soft capping, and looks for
    the KV of sliding-window layers at slots of the other layers' pool, and for keys where the cache
    of latent attention has none: such layers are computed here, in float32.
    """

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert forward_batch.extend_seq_lens is not None
        counts = forward_batch.extend_seq_lens.tolist()
        if self._is_expanded(layer):
            return _attend_to_own(q, k, v, layer, counts)
        if self._is_plain(layer, sinks):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, layer, forward_batch, counts, sinks)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._is_plain(layer, sinks):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self._save(k, v, layer, forward_batch, save_kv_cache)
        counts = [1] * forward_batch.batch_size
        return self._attend(q, layer, forward_batch, counts, sinks)

    def _is_plain(self, layer: Any, sinks: torch.Tensor | None) -> bool:
        other_pool = self.use_sliding_window_kv_pool and _window(layer) != NO_WINDOW
        return not other_pool and not layer.logit_cap and sinks is None

    def _is_expanded(self, layer: Any) -> bool:
        """Whether the cache has, in place of this layer's keys, what they are made from: so it is
        with multi-head latent attention, where a pass of prompts from their first tokens on is
        computed from keys and values themselves."""
        pool: Any = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id).shape[-1] != layer.qk_head_dim

    def _save(
        self, k: torch.Tensor, v: torch.Tensor, layer: Any, batch: ForwardBatch, asked: bool
    ) -> None:
        if asked and k is not None:
            loc = KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc)
            pool: Any = self.token_to_kv_pool
            pool.set_kv_buffer(layer, loc, k, v)

    def _attend(
        self,
        q: torch.Tensor,
        layer: Any,
        batch: ForwardBatch,
        counts: list[int],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal attention over the cache. q: [tokens, query heads * head_dim], counts[i] of
        request i, the last ones that it has; returns [tokens, query heads * v_head_dim]."""
        pool: Any = self.token_to_kv_pool
        rows: Any = self.req_to_token_pool
        k_cache = pool.get_key_buffer(layer.layer_id)
        v_cache = pool.get_value_buffer(layer.layer_id)
        window = _window(layer)
        translate = self.use_sliding_window_kv_pool and window != NO_WINDOW
        outputs = []
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).split(counts)
        for row, end, query in zip(
            batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), queries, strict=True
        ):
            first = 0 if window == NO_WINDOW else max(end - len(query) - window, 0)
            slots = rows.req_to_token[row, first:end].to(torch.int64)
            if translate:
                slots = pool.translate_loc_from_full_to_swa(slots)
            outputs.append(_attention(query, k_cache[slots], v_cache[slots], layer, sinks))
        return torch.cat(outputs).to(q.dtype).view(q.shape[0], -1)


def _attend_to_own(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, counts: list[int]
) -> torch.Tensor:
    """Causal attention of requests to their own tokens, counts[i] of request i. q, k: [tokens,
    heads * dim]; v, and what is returned: [tokens, heads * v_dim]."""
    parts = (x.reshape(len(q), layer.tp_q_head_num, -1).split(counts) for x in (q, k, v))
    outputs = [
        _attention(q_i, k_i, v_i, layer, sinks=None) for q_i, k_i, v_i in zip(*parts, strict=True)
    ]
    return torch.cat(outputs).to(q.dtype).view(len(q), -1)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, sinks: torch.Tensor | None
) -> torch.Tensor:
    """q: [queries, heads, dim], the last tokens of k, v: [tokens, KV heads, dim]; returns float32
    [queries, heads, v_dim]."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(share, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * layer.scaling
    if layer.logit_cap:
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    of = torch.arange(len(k))[None, :]
    seen = of <= at
    if _window(layer) != NO_WINDOW:
        seen &= of >= at - _window(layer)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:  # a further score of each head, with no value behind it
        sink = sinks.float().view(-1, 1, 1).expand(-1, len(q), 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v)


def _window(layer: Any) -> int:
    """Tokens before its own that each sees, `NO_WINDOW` for all."""
    return NO_WINDOW if layer.sliding_window_size is None else layer.sliding_window_size
