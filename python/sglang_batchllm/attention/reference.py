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
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Every request attends to all its tokens: sharing changes no result.

    q: [batch, query heads, head_dim]; k_cache, v_cache: [slots, KV heads, head_dim];
    req_to_token: [rows, context]; rows, seq_lens: [batch]; sinks: one logit per query head, in
    the denominator only; window: tokens that it attends to, the last ones, None for all. Returns
    [batch, query heads, head_dim] in ``dtype``; a request without tokens gets zeros.
    """
    batch, num_heads, _ = q.shape
    ratio = num_heads // k_cache.shape[1]
    out = torch.zeros((batch, num_heads, v_cache.shape[2]), dtype=dtype, device=q.device)
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        if length <= 0:
            continue
        slots = req_to_token[row, _first_seen(length, window) : length].long()
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
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The same, computed as the fused kernel does: a node's tokens once for all its members.

    group_id, prefix_len: int32 [levels, rows], as in ``GroupTable``; the other arguments and the
    result are those of ``reference_decode``.
    """
    batch, num_heads, _ = q.shape
    row_list, length_list = rows.tolist(), seq_lens.tolist()
    queries = q.to(dtype)
    done = [0] * batch
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch)]

    def read(members: list[int], end: int) -> None:
        firsts = [_first_seen(length_list[i], window) for i in members]
        start = min(max(done[members[0]], min(firsts)), end)
        slots = req_to_token[row_list[members[0]], start:end].long()
        seen = torch.arange(start, end) >= torch.tensor(firsts)[:, None]
        seen = seen.to(q.device)
        out, lse = _attend(queries[members], k_cache[slots], v_cache[slots], seen, scale, softcap)
        for j, i in enumerate(members):
            parts[i].append((out[j], lse[j]))
            done[i] = end

    for ids, ends in zip(group_id.tolist(), prefix_len.tolist(), strict=True):
        nodes: dict[int, list[int]] = {}
        for i, (row, length) in enumerate(zip(row_list, length_list, strict=True)):
            if ids[row] > 0 and done[i] < ends[row] < length:
                nodes.setdefault(ids[row], []).append(i)
        for members in nodes.values():
            read(members, ends[row_list[members[0]]])
    out = torch.zeros((batch, num_heads, v_cache.shape[2]), dtype=dtype, device=q.device)
    for i, length in enumerate(length_list):
        if length <= 0:
            continue
        read([i], length)
        values = torch.stack([value for value, _ in parts[i]])
        lse = torch.stack([lse for _, lse in parts[i]])
        denominator = lse if sinks is None else torch.cat([lse, sinks.to(dtype)[None]])
        weights = torch.exp(lse - torch.logsumexp(denominator, 0))
        out[i] = (values * weights[:, :, None]).sum(0)
    return out


def _first_seen(length: int, window: int | None) -> int:
    """Position of the first token that the last of `length` attends to."""
    return 0 if window is None else max(length - window, 0)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [m, heads, d] over those of k, v [n, KV heads, d] that are seen [m, n]: the result [m,
    heads, d] and its log-sum-exp."""
    m, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    if k.shape[0] == 0:
        empty = torch.full((m, num_heads), -torch.inf, dtype=q.dtype, device=q.device)
        return q.new_zeros((m, num_heads, v.shape[2])), empty
    grouped = q.view(m, num_kv_heads, num_heads // num_kv_heads, dim)
    logits = torch.einsum("mgrd,ngd->mgrn", grouped, k.to(q.dtype)) * scale
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    unseen = ~seen[:, None, None]
    lse = torch.logsumexp(logits.masked_fill(unseen, -torch.inf), dim=-1)
    weights = torch.exp(logits - lse[..., None]).masked_fill(unseen, 0.0)
    out = torch.einsum("mgrn,ngd->mgrd", weights, v.to(q.dtype))
    return out.reshape(m, num_heads, v.shape[2]), lse.reshape(m, num_heads)
