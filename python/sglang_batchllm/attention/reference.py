"""Plain torch reference of decode attention over a paged KV cache with shared prefixes."""

from __future__ import annotations

import torch


def reference_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Every request attends to all its tokens: sharing changes no result.

    q: [batch, query heads, head_dim]; k_cache, v_cache: [slots, KV heads, head_dim];
    req_to_token: [rows, context]; rows, seq_lens: [batch]; sinks: one logit per query head, in
    the denominator only. Returns [batch, query heads, head_dim] in ``dtype``; a request without
    tokens gets zeros.
    """
    batch, num_heads, _ = q.shape
    ratio = num_heads // k_cache.shape[1]
    out = torch.zeros((batch, num_heads, v_cache.shape[2]), dtype=dtype, device=q.device)
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        if length <= 0:
            continue
        slots = req_to_token[row, :length].long()
        k = k_cache[slots].to(dtype).repeat_interleave(ratio, dim=1)
        v = v_cache[slots].to(dtype).repeat_interleave(ratio, dim=1)
        logits = torch.einsum("hd,nhd->hn", q[i].to(dtype), k) * scale
        if softcap > 0.0:
            logits = softcap * torch.tanh(logits / softcap)
        if sinks is not None:
            logits = torch.cat([logits, sinks.to(dtype)[:, None]], dim=1)
            weights = torch.softmax(logits, dim=1)[:, :-1]
        else:
            weights = torch.softmax(logits, dim=1)
        out[i] = torch.einsum("hn,nhd->hd", weights, v)
    return out


def shared_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    group_id: torch.Tensor,
    prefix_len: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The same, computed as the fused kernel does: a group's prefix once for all its members.

    group_id, prefix_len: int32 [rows], as in ``GroupTable``; the other arguments and the result are
    those of ``reference_decode``.
    """
    batch, num_heads, _ = q.shape
    out = torch.zeros((batch, num_heads, v_cache.shape[2]), dtype=dtype, device=q.device)
    row_list, length_list = rows.tolist(), seq_lens.tolist()
    groups: dict[int, list[int]] = {}
    for i, (row, length) in enumerate(zip(row_list, length_list, strict=True)):
        group, prefix = int(group_id[row]), int(prefix_len[row])
        shares = group > 0 and 0 < prefix < length
        groups.setdefault(group if shares else -1 - i, []).append(i)
    for group, members in groups.items():
        prefix = int(prefix_len[row_list[members[0]]]) if group > 0 else 0
        queries = q[members].to(dtype)
        slots = req_to_token[row_list[members[0]], :prefix].long()
        shared, shared_lse = _attend(queries, k_cache[slots], v_cache[slots], scale, softcap)
        for j, i in enumerate(members):
            if length_list[i] <= 0:
                continue
            slots = req_to_token[row_list[i], prefix : length_list[i]].long()
            own, own_lse = _attend(
                queries[j : j + 1], k_cache[slots], v_cache[slots], scale, softcap
            )
            lse = torch.stack([shared_lse[j], own_lse[0]])
            denominator = lse if sinks is None else torch.cat([lse, sinks.to(dtype)[None]])
            weights = torch.exp(lse - torch.logsumexp(denominator, 0))
            out[i] = shared[j] * weights[0, :, None] + own[0] * weights[1, :, None]
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [m, heads, d] over k, v [n, KV heads, d]: the result [m, heads, d] and its log-sum-exp."""
    m, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    if k.shape[0] == 0:
        empty = torch.full((m, num_heads), -torch.inf, dtype=q.dtype, device=q.device)
        return q.new_zeros((m, num_heads, v.shape[2])), empty
    grouped = q.view(m, num_kv_heads, num_heads // num_kv_heads, dim)
    logits = torch.einsum("mgrd,ngd->mgrn", grouped, k.to(q.dtype)) * scale
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=-1)
    out = torch.einsum("mgrn,ngd->mgrd", torch.exp(logits - lse[..., None]), v.to(q.dtype))
    return out.reshape(m, num_heads, v.shape[2]), lse.reshape(m, num_heads)
