"""Which nodes of the running requests' prefix tree a step reads together, chosen on the GPU.

A request's path has up to ``GroupTable.levels`` nodes that others may share, outermost first. A
node that is *read together* is read once per tile of its members, from the end of the nearest node
above that is; the tokens of one that is not fall to what is below it, and in the end to the
requests' own suffixes. All members of a node have the same nodes above it, and so the same parts.

In layers with a sliding window a request reads from the first token of its own window on, and a
node from the first of any member's: of what comes before their own windows the members see nothing.

What lies below a node would read its tokens once per *reader*, a tile of a node that was chosen or
a request by itself. Reading them together saves (readers - tiles) * tokens reads and costs each
member one part more to merge. From the leaves up the nodes are found that save reads; from the root
down those are left out whose tokens, which are now known, do not pay for the parts. (FastTree,
MLSys'25, chooses by a cost model on the host; here the choice follows the members that still run,
step by step.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_batchllm.attention.items import count_parts

GROUP_FIELDS = tl.constexpr(8)
"""int32 fields of a node, each an array over the level's nodes.

0: members. 1: readers; then tiles, 0 where it is not read together. 2: tokens that it adds to the
node above; then those that are read. 3: where the first of the members' windows begins, if they
have one; then the position of the first token that is read. 4: the node's end, if there are
windows; then the first token's place in the slots. 5: first entry in ``members``. 6: readers saved;
then first item. 7: parts before it.
"""
REQUEST_FIELDS = tl.constexpr(6)
"""int32 fields of a request.

0: first part. 1: parts. 2: first suffix item. 3: suffix start. 4: 1 where the suffix is wide. 5:
where its window begins, if there is one. Then for each level its rank among the node's members, -1
where it does not read it together with them.
"""

MIN_SPLIT = tl.constexpr(256)
"""Fewest tokens a split is cut for: below, an item's fixed cost is more than what balance gains."""
MERGE_TOKENS = tl.constexpr(16)
"""Tokens that a program reads in the time of merging one part: L tokens in splits of S take
S + MERGE_TOKENS * L / S, least at sqrt(MERGE_TOKENS * L)."""


@triton.jit
def _members_of(group_id_ptr, prefix_len_ptr, row, level, num_rows, num_groups, in_batch, seq_len):
    """Each request's node at a level: its id, the node's end, the end above, and whether it has
    one."""
    at = level * num_rows + row
    group = tl.load(group_id_ptr + at, mask=in_batch, other=0)
    end = tl.load(prefix_len_ptr + at, mask=in_batch, other=0)
    above = tl.load(prefix_len_ptr + at - num_rows, mask=in_batch & (level > 0), other=0)
    inside = in_batch & (group > 0) & (group < num_groups) & (end > above) & (end < seq_len)
    return tl.where(inside, group, 0), end, above, inside


# A step in which prefill and decode mix has any batch size: one compilation must do for all.
@triton.jit(do_not_specialize=["batch_size", "levels"])
def plan_kernel(
    rows_ptr,
    seq_lens_ptr,
    group_id_ptr,
    prefix_len_ptr,
    header_ptr,
    group_ptr,
    request_ptr,
    batch_size,
    levels,
    num_rows,
    num_groups,
    slot_capacity,
    member_capacity,
    wave_items,
    suffix_target,
    min_saved_tokens,
    part_tokens,
    wide_tokens,
    window,
    LANES_SMALL: tl.constexpr,
    LANES_LARGE: tl.constexpr,
    STRIDE_B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One program: choose what is read together and the split sizes, lay the items out.

    group_ptr: int32 [levels, GROUP_FIELDS, BLOCK_G]; request_ptr: int32 [REQUEST_FIELDS + levels,
    STRIDE_B]; header_ptr: as WorkList.
    """
    g = tl.arange(0, BLOCK_G)
    b = tl.arange(0, BLOCK_B)
    LEVEL: tl.constexpr = GROUP_FIELDS * BLOCK_G
    rank_ptr = request_ptr + REQUEST_FIELDS * STRIDE_B
    for level in range(levels):
        tl.store(group_ptr + level * LEVEL + g, tl.zeros([BLOCK_G], tl.int32))
        tl.store(group_ptr + level * LEVEL + BLOCK_G + g, tl.zeros([BLOCK_G], tl.int32))
        if WINDOWED:
            none = tl.full([BLOCK_G], 2**30, tl.int32)
            tl.store(group_ptr + level * LEVEL + 3 * BLOCK_G + g, none)
    tl.debug_barrier()

    in_batch = b < batch_size
    row = tl.load(rows_ptr + b, mask=in_batch, other=0).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + b, mask=in_batch, other=0).to(tl.int32)

    window_start = tl.maximum(seq_len - window, 0)

    # From the leaves up. Loads that atomics or other threads changed are volatile: those are behind
    # this SM's L1 cache.
    readers = tl.where(in_batch, 1, 0)
    for upwards in range(levels):
        level = levels - 1 - upwards
        node_ptr = group_ptr + level * LEVEL
        group, end, above, inside = _members_of(  # pyright: ignore[reportGeneralTypeIssues]
            group_id_ptr, prefix_len_ptr, row, level, num_rows, num_groups, in_batch, seq_len
        )
        rank = tl.atomic_add(node_ptr + group, 1, mask=inside)
        tl.atomic_add(node_ptr + BLOCK_G + group, readers, mask=inside)
        tl.store(node_ptr + 2 * BLOCK_G + group, end - above, mask=inside)
        if WINDOWED:
            tl.atomic_min(node_ptr + 3 * BLOCK_G + group, window_start, mask=inside)
            tl.store(node_ptr + 4 * BLOCK_G + group, end, mask=inside)
        tl.store(rank_ptr + level * STRIDE_B + b, rank)
        tl.debug_barrier()
        members = tl.load(node_ptr + g, volatile=True)
        below = tl.load(node_ptr + BLOCK_G + g, volatile=True)
        length = tl.load(node_ptr + 2 * BLOCK_G + g, mask=members > 0, other=0, volatile=True)
        if WINDOWED:
            first = tl.load(node_ptr + 3 * BLOCK_G + g, volatile=True)
            node_end = tl.load(node_ptr + 4 * BLOCK_G + g, volatile=True)
            length = tl.maximum(tl.minimum(length, node_end - first), 0)
        lanes = tl.where(members <= LANES_SMALL, LANES_SMALL, LANES_LARGE)
        tiles = (members + lanes - 1) // lanes
        saved = (below - tiles).to(tl.int64) * length
        together = (members > 1) & (saved >= min_saved_tokens)
        tl.debug_barrier()
        tl.store(node_ptr + BLOCK_G + g, tl.where(together, tiles, 0))
        tl.store(node_ptr + 6 * BLOCK_G + g, below - tiles)
        tl.debug_barrier()
        tiles_of = tl.load(node_ptr + BLOCK_G + group, mask=inside, other=0, volatile=True)
        readers = tl.where(tiles_of > 0, tl.where(rank == 0, tiles_of, 0), readers)

    # From the root down: where each one's tokens begin. Those of one that does not pay, or whose
    # slots or members do not fit, are left to those below it.
    shared = tl.zeros([BLOCK_B], tl.int32)
    slots_used = tl.zeros([], tl.int64)
    members_used = tl.zeros([], tl.int32)
    prefix_work = tl.zeros([], tl.int64)
    for level in range(levels):
        node_ptr = group_ptr + level * LEVEL
        group, end, above, inside = _members_of(  # pyright: ignore[reportGeneralTypeIssues]
            group_id_ptr, prefix_len_ptr, row, level, num_rows, num_groups, in_batch, seq_len
        )
        tiles_of = tl.load(node_ptr + BLOCK_G + group, mask=inside, other=0, volatile=True)
        chosen = inside & (tiles_of > 0)
        start = shared
        if WINDOWED:
            first = tl.load(node_ptr + 3 * BLOCK_G + group, mask=chosen, other=0, volatile=True)
            start = tl.maximum(shared, first)
            tl.debug_barrier()
        tl.store(node_ptr + 2 * BLOCK_G + group, end - start, mask=chosen)
        tl.store(node_ptr + 3 * BLOCK_G + group, start, mask=chosen)
        tl.debug_barrier()
        members = tl.load(node_ptr + g, volatile=True)
        tiles = tl.load(node_ptr + BLOCK_G + g, volatile=True)
        length = tl.load(node_ptr + 2 * BLOCK_G + g, mask=tiles > 0, other=0, volatile=True)
        saved = tl.load(node_ptr + 6 * BLOCK_G + g, volatile=True).to(tl.int64) * length
        pays = (tiles > 0) & (saved >= min_saved_tokens + part_tokens * members)
        members = tl.where(pays, members, 0)
        length = tl.where(pays, length, 0)
        slot_end = slots_used + tl.cumsum(length.to(tl.int64), 0)
        member_end = members_used + tl.cumsum(members, 0)
        fits = pays & (slot_end <= slot_capacity) & (member_end <= member_capacity)
        slots_used = tl.maximum(slots_used, tl.max(slot_end))
        members_used = tl.maximum(members_used, tl.max(member_end))
        tiles = tl.where(fits, tiles, 0)
        prefix_work += tl.sum(tiles.to(tl.int64) * length)
        tl.debug_barrier()
        tl.store(node_ptr + BLOCK_G + g, tiles)
        tl.store(node_ptr + 4 * BLOCK_G + g, (slot_end - length).to(tl.int32))
        tl.store(node_ptr + 5 * BLOCK_G + g, member_end - members)
        tl.debug_barrier()
        tiles_of = tl.load(node_ptr + BLOCK_G + group, mask=chosen, other=0, volatile=True)
        shared = tl.where(tiles_of > 0, end, shared)

    if WINDOWED:
        shared = tl.maximum(shared, window_start)
        tl.store(request_ptr + 5 * STRIDE_B + b, window_start)
    suffix = seq_len - shared
    suffix_work = tl.sum(suffix.to(tl.int64))
    work = prefix_work + suffix_work
    # Long prefix items are fine where suffix items fill the gaps behind them.
    prefix_target = tl.where(10 * suffix_work < 3 * work, 3 * wave_items, wave_items)
    prefix_split = tl.maximum((work + prefix_target - 1) // prefix_target, MIN_SPLIT)
    prefix_split = ((prefix_split + 63) // 64 * 64).to(tl.int32)
    suffix_split = tl.maximum((work + suffix_target - 1) // suffix_target, MIN_SPLIT)
    suffix_split = ((suffix_split + 63) // 64 * 64).to(tl.int32)

    # Few requests: one item per program, where splits not far above the mean have that.
    split = (work + wave_items - 1) // wave_items
    merged = tl.sqrt(tl.max(suffix).to(tl.float32) * MERGE_TOKENS)
    split = tl.maximum(tl.maximum(split, merged.to(tl.int64)), MIN_SPLIT)
    split = ((split + 63) // 64 * 64).to(tl.int32)
    widest = tl.where(batch_size <= wave_items, 5 * split // 3, 0)
    one_wave = split < 0
    while (split <= widest) & (one_wave == 0):
        items = tl.sum(tl.where(in_batch, tl.maximum(count_parts(suffix, split), 1), 0))
        for level in range(levels):
            node_ptr = group_ptr + level * LEVEL
            tiles = tl.load(node_ptr + BLOCK_G + g, volatile=True)
            length = tl.load(node_ptr + 2 * BLOCK_G + g, mask=tiles > 0, other=0, volatile=True)
            items += tl.sum(tiles * count_parts(length, split))
        one_wave = items <= wave_items
        split = tl.where(one_wave, split, split + (split // 8 + 63) // 64 * 64)
    prefix_split = tl.where(one_wave, split, prefix_split)
    suffix_split = tl.where(one_wave, split, suffix_split)

    parts = tl.zeros([BLOCK_B], tl.int32)
    prefix_items = tl.zeros([], tl.int32)
    for level in range(levels):
        node_ptr = group_ptr + level * LEVEL
        group, end, above, inside = _members_of(  # pyright: ignore[reportGeneralTypeIssues]
            group_id_ptr, prefix_len_ptr, row, level, num_rows, num_groups, in_batch, seq_len
        )
        tiles = tl.load(node_ptr + BLOCK_G + g, volatile=True)
        length = tl.load(node_ptr + 2 * BLOCK_G + g, mask=tiles > 0, other=0, volatile=True)
        items = tiles * count_parts(length, prefix_split)
        item_end = prefix_items + tl.cumsum(items, 0)
        tl.store(node_ptr + 6 * BLOCK_G + g, item_end - items)
        prefix_items += tl.sum(items)
        tiles_of = tl.load(node_ptr + BLOCK_G + group, mask=inside, other=0, volatile=True)
        length_of = tl.load(
            node_ptr + 2 * BLOCK_G + group, mask=tiles_of > 0, other=0, volatile=True
        )
        tl.store(node_ptr + 7 * BLOCK_G + group, parts, mask=tiles_of > 0)
        rank = tl.load(rank_ptr + level * STRIDE_B + b, mask=inside, other=0, volatile=True)
        tl.store(rank_ptr + level * STRIDE_B + b, tl.where(tiles_of > 0, rank, -1))
        parts += count_parts(length_of, prefix_split)

    # Requests without tokens (padding) still get an item: it writes zeros.
    wide = in_batch & (one_wave == 0) & (suffix <= wide_tokens)
    wide_parts = tl.where(wide, 1, 0)
    own_parts = tl.where(in_batch, tl.maximum(count_parts(suffix, suffix_split), 1), 0)
    own_parts = tl.where(wide, 0, own_parts)
    parts = tl.where(in_batch, parts, 0) + own_parts + wide_parts
    narrow_items = prefix_items + tl.sum(own_parts)
    first_item = tl.where(
        wide,
        narrow_items + tl.cumsum(wide_parts, 0) - wide_parts,
        prefix_items + tl.cumsum(own_parts, 0) - own_parts,
    )
    tl.store(request_ptr + b, tl.cumsum(parts, 0) - parts)
    tl.store(request_ptr + STRIDE_B + b, parts)
    tl.store(request_ptr + 2 * STRIDE_B + b, first_item)
    tl.store(request_ptr + 3 * STRIDE_B + b, shared)
    tl.store(request_ptr + 4 * STRIDE_B + b, wide_parts)
    tl.store(header_ptr, narrow_items + tl.sum(wide_parts))
    tl.store(header_ptr + 1, prefix_split)
    tl.store(header_ptr + 2, suffix_split)
    tl.store(header_ptr + 3, narrow_items)
