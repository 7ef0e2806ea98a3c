"""The fused prefix-shared decode attention kernel.

One launch runs all work items of a step (``worklist.py``), prefix and suffix alike, from a queue
that starts with the prefix items; a second, small one merges the parts of each request by
log-sum-exp. (Merging in the first launch, by the last item of a request to finish, was slower:
the release it needs makes every item wait for its own stores. Prefix items spread among suffix
items were much slower: the tiles of a node find its KV in the L2 when they run together.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_batchllm.attention.items import KIND_SMALL, KIND_SUFFIX, KIND_WIDE, LOG2_E


@triton.jit
def _attend(
    q,
    q_rope,
    k_ptr,
    v_ptr,
    slot_ptr,
    num_tokens,
    row_start,
    stride_k,
    stride_v,
    qk_scale,
    softcap_log2,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO_P2: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attention of a query tile over the tokens of one slot list, with a running (base 2) softmax.

    q: [BLOCK_M, BLOCK_D]; k_ptr, v_ptr: the first KV head's first element at slot 0. With several
    KV heads, RATIO_P2 rows of the tile are of each, and BLOCK_N / KV_HEADS tokens are taken at a
    time, of which each row sees its own head's: what tensor cores compute in vain were else rows
    of nobody. Where WINDOWED, a row sees the tokens from its row_start [BLOCK_M] on, which may be
    none. With ROPE_DIM, a key is its value and so many elements more, the latter for q_rope
    [BLOCK_M, ROPE_DIM]. Returns the accumulator [BLOCK_M, BLOCK_D] and the row maximum and sum
    [BLOCK_M], fp32.
    """
    TOKENS: tl.constexpr = BLOCK_N // KV_HEADS
    offs_n = tl.arange(0, BLOCK_N) // KV_HEADS
    offs_d = tl.arange(0, BLOCK_D)
    if KV_HEADS > 1:
        kv_head = tl.arange(0, BLOCK_N) % KV_HEADS
        own = (tl.arange(0, BLOCK_M) // RATIO_P2)[:, None] == kv_head[None, :]
    row_max = tl.full([BLOCK_M], -1e30 if WINDOWED else -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(0, num_tokens, TOKENS, num_stages=STAGES):
        position = start + offs_n
        valid = position < num_tokens
        # Past the end nothing is read (MASKED, for ragged suffixes), or the last token once more.
        if MASKED:
            slot = tl.load(slot_ptr + position, mask=valid, other=0)
        else:
            slot = tl.load(slot_ptr + tl.minimum(position, num_tokens - 1))
        row = slot.to(tl.int64)[:, None]
        k_at = k_ptr + row * stride_k + offs_d[None, :]
        v_at = v_ptr + row * stride_v + offs_d[None, :]
        if KV_HEADS > 1:
            k_at += kv_head[:, None] * HEAD_DIM
            v_at += kv_head[:, None] * HEAD_DIM
        if MASKED or HEAD_DIM != BLOCK_D:
            mask = valid[:, None] & (offs_d[None, :] < HEAD_DIM)
            k = tl.load(k_at, mask=mask, other=0.0)
            v = k if ROPE_DIM > 0 else tl.load(v_at, mask=mask, other=0.0)
        else:
            k = tl.load(k_at)
            v = k if ROPE_DIM > 0 else tl.load(v_at)
        logits = tl.dot(q, k.to(q.dtype).T, input_precision=PRECISION)
        if ROPE_DIM > 0:
            rope_at = k_ptr + row * stride_k + HEAD_DIM + tl.arange(0, ROPE_DIM)[None, :]
            rope = tl.load(rope_at, mask=valid[:, None], other=0.0) if MASKED else tl.load(rope_at)
            logits = tl.dot(q_rope, rope.to(q.dtype).T, logits, input_precision=PRECISION)
        if SOFTCAP:
            # softcap * tanh(x / softcap), with qk_scale and softcap both carrying log2(e).
            e = tl.exp2(logits * (qk_scale * (2.0 * LOG2_E) / softcap_log2))
            logits = (softcap_log2 / qk_scale) * (1.0 - 2.0 / (e + 1.0))
        seen = valid[None, :]
        if KV_HEADS > 1:
            seen = seen & own
        if WINDOWED:
            seen = seen & (position[None, :] >= row_start[:, None])
        logits = tl.where(seen, logits, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1) * qk_scale)
        p = tl.exp2(logits * qk_scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _run_item(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    sink_ptr,
    slot_ptr,
    member_ptr,
    part_base_ptr,
    window_start_ptr,
    num_tokens,
    token,
    request,
    members,
    part,
    kv_head,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    qk_scale,
    softcap_log2,
    v_scale,
    NUM_KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_P2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    SUFFIX: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One work item for one KV head; rows of the tile are (member, query head of the KV head), or
    (KV head, query head of it) for several. token: of those that members share, the first one's
    position."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * RATIO
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_group = offs_m % RATIO_P2
    head = kv_head * RATIO + in_group
    if SUFFIX:
        head += offs_m // RATIO_P2 * RATIO
        valid = (offs_m < RATIO_P2 * KV_HEADS) & (in_group < RATIO)
        row_request = tl.zeros([BLOCK_M], tl.int32) + request
        row_part = tl.zeros([BLOCK_M], tl.int32) + part
    else:
        lane = offs_m // RATIO_P2
        valid = (lane < members) & (in_group < RATIO)
        row_request = tl.load(member_ptr + lane, mask=lane < members, other=0)
        row_part = tl.load(part_base_ptr + row_request) + part
    row_start = row_part
    if WINDOWED and not SUFFIX:
        row_start = tl.load(window_start_ptr + row_request) - token
    mask = valid[:, None] & (offs_d[None, :] < HEAD_DIM)
    q_at = row_request * stride_q + head * (HEAD_DIM + ROPE_DIM)
    q = tl.load(q_ptr + (q_at[:, None] + offs_d[None, :]), mask=mask, other=0.0)
    q_rope = q
    if ROPE_DIM > 0:
        rope_at = q_at[:, None] + HEAD_DIM + tl.arange(0, ROPE_DIM)[None, :]
        q_rope = tl.load(q_ptr + rope_at, mask=valid[:, None], other=0.0)
    acc, row_max, row_sum = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        q, q_rope, k_ptr + kv_head * HEAD_DIM, v_ptr + kv_head * HEAD_DIM, slot_ptr, num_tokens,
        row_start, stride_k, stride_v, qk_scale, softcap_log2, HEAD_DIM, ROPE_DIM, BLOCK_M, BLOCK_N,
        BLOCK_D, STAGES, SOFTCAP, PRECISION, MASKED, KV_HEADS, RATIO_P2, WINDOWED and not SUFFIX,
    )  # fmt: skip
    lse = row_max + tl.log2(row_sum)
    result = acc * (1.0 / tl.where(row_sum > 0.0, row_sum, 1.0))[:, None]
    if SUFFIX and part < 0:
        # The request's only part: no workspace.
        result = result * v_scale
        if SINKS:
            sink = tl.load(sink_ptr + head, mask=valid, other=0.0).to(tl.float32)
            result = result * (1.0 / (1.0 + tl.exp2(sink * LOG2_E - lse)))[:, None]
        out_at = row_request * stride_out + head * HEAD_DIM
        tl.store(
            out_ptr + (out_at[:, None] + offs_d[None, :]),
            result.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        at = row_part * NUM_HEADS + head
        tl.store(lse_ptr + at, lse, mask=valid)
        tl.store(
            part_ptr + (at[:, None] * HEAD_DIM + offs_d[None, :]),
            result.to(part_ptr.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def _load_item(
    item_ptr,
    ticket,
    narrow,
    total,
    NUM_KV_HEADS: tl.constexpr,
    WIDE_HEADS: tl.constexpr,
):
    """The KV head, the first of several, and the fields of a ticket's item (items.py); zeros past
    the end. narrow: tickets before those of wide items."""
    WIDE_TICKETS: tl.constexpr = NUM_KV_HEADS // WIDE_HEADS
    index = ticket // NUM_KV_HEADS
    kv_head = ticket % NUM_KV_HEADS
    if ticket >= narrow:
        index = narrow // NUM_KV_HEADS + (ticket - narrow) // WIDE_TICKETS
        kv_head = (ticket - narrow) % WIDE_TICKETS * WIDE_HEADS
    item = item_ptr + index * 8
    some = ticket < total
    kind = tl.load(item, mask=some, other=0)
    row = tl.load(item + 1, mask=some, other=0)
    start = tl.load(item + 2, mask=some, other=0)
    tokens = tl.load(item + 3, mask=some, other=0)
    first = tl.load(item + 4, mask=some, other=0)
    members = tl.load(item + 5, mask=some, other=0)
    part = tl.load(item + 6, mask=some, other=0)
    return kv_head, kind, row, start, tokens, first, members, part


@triton.jit
def _draw(queue_ptr, THREADS: tl.constexpr):
    """Start drawing a ticket: one element per thread, so that nothing waits for the answer here."""
    thread = tl.arange(0, THREADS)
    return tl.atomic_add(queue_ptr + thread * 0, 1, mask=thread == 0, sem="relaxed")


@triton.jit
def _drawn(draw, THREADS: tl.constexpr):
    """The ticket of an earlier ``_draw``."""
    return tl.sum(tl.where(tl.arange(0, THREADS) == 0, draw, 0))


@triton.jit
def fused_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    queue_ptr,
    sink_ptr,
    req_to_token_ptr,
    slots_ptr,
    header_ptr,
    item_ptr,
    member_ptr,
    part_base_ptr,
    window_start_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    req_to_token_stride,
    qk_scale,
    softcap_log2,
    v_scale,
    NUM_KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_P2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M_SMALL: tl.constexpr,
    BLOCK_N_SMALL: tl.constexpr,
    STAGES_SMALL: tl.constexpr,
    BLOCK_M_LARGE: tl.constexpr,
    BLOCK_N_LARGE: tl.constexpr,
    STAGES_LARGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE_HEADS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Persistent programs run (item, KV head) tickets, the heads of an item next to each other.

    A program's first ticket is its own number, the others come from a counter. While an item
    runs, the next one's record and the ticket after that are on their way. Every program draws
    once more than it runs, so the draw number ``total + programs - 1`` is the last of all, and
    whoever has it rewinds the counter.
    """
    programs = tl.num_programs(0)
    narrow = tl.load(header_ptr + 3) * NUM_KV_HEADS
    total = narrow + (tl.load(header_ptr) - tl.load(header_ptr + 3)) * (NUM_KV_HEADS // WIDE_HEADS)
    ticket = tl.program_id(0)
    draw = _draw(queue_ptr, THREADS)
    kv_head, kind, row, start, tokens, first, members, part = _load_item(
        item_ptr, ticket, narrow, total, NUM_KV_HEADS, WIDE_HEADS
    )
    while ticket < total:
        next_ticket = programs + _drawn(draw, THREADS)
        kv_head_, kind_, row_, start_, tokens_, first_, members_, part_ = _load_item(
            item_ptr, next_ticket, narrow, total, NUM_KV_HEADS, WIDE_HEADS
        )
        draw = _draw(queue_ptr, THREADS)
        own_slot_ptr = req_to_token_ptr + row.to(tl.int64) * req_to_token_stride + start
        if kind == KIND_SUFFIX:
            _run_item(
                q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, sink_ptr, own_slot_ptr, member_ptr,
                part_base_ptr, window_start_ptr, tokens, row, first, members, part, kv_head,
                stride_q, stride_k, stride_v, stride_out, qk_scale, softcap_log2, v_scale,
                NUM_KV_HEADS, RATIO, RATIO_P2, HEAD_DIM, ROPE_DIM, BLOCK_M_SMALL, BLOCK_N_SMALL,
                BLOCK_D, STAGES_SMALL, SOFTCAP, SINKS, PRECISION, True, True, 1, WINDOWED,
            )  # fmt: skip
        elif kind == KIND_WIDE:
            _run_item(
                q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, sink_ptr, own_slot_ptr, member_ptr,
                part_base_ptr, window_start_ptr, tokens, row, first, members, part, kv_head,
                stride_q, stride_k, stride_v, stride_out, qk_scale, softcap_log2, v_scale,
                NUM_KV_HEADS, RATIO, RATIO_P2, HEAD_DIM, ROPE_DIM, BLOCK_M_SMALL, BLOCK_N_SMALL,
                BLOCK_D, STAGES_SMALL, SOFTCAP, SINKS, PRECISION, True, True, WIDE_HEADS, WINDOWED,
            )  # fmt: skip
        elif kind == KIND_SMALL:
            _run_item(
                q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, sink_ptr, slots_ptr + start,
                member_ptr + first, part_base_ptr, window_start_ptr, tokens, row, first, members,
                part, kv_head, stride_q, stride_k, stride_v, stride_out, qk_scale, softcap_log2,
                v_scale, NUM_KV_HEADS, RATIO, RATIO_P2, HEAD_DIM, ROPE_DIM, BLOCK_M_SMALL,
                BLOCK_N_SMALL, BLOCK_D, STAGES_SMALL, SOFTCAP, SINKS, PRECISION, True, False, 1,
                WINDOWED,
            )  # fmt: skip
        else:
            _run_item(
                q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, sink_ptr, slots_ptr + start,
                member_ptr + first, part_base_ptr, window_start_ptr, tokens, row, first, members,
                part, kv_head, stride_q, stride_k, stride_v, stride_out, qk_scale, softcap_log2,
                v_scale, NUM_KV_HEADS, RATIO, RATIO_P2, HEAD_DIM, ROPE_DIM, BLOCK_M_LARGE,
                BLOCK_N_LARGE, BLOCK_D, STAGES_LARGE, SOFTCAP, SINKS, PRECISION, False, False, 1,
                WINDOWED,
            )  # fmt: skip
        ticket = next_ticket
        kv_head, kind, row, start, tokens = kv_head_, kind_, row_, start_, tokens_
        first, members, part = first_, members_, part_
    if _drawn(draw, THREADS) == total + programs - 1:
        tl.store(queue_ptr, 0)
