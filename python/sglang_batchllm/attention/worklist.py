"""The work list of a decode step: which (queries, KV tokens) pairs one attention launch computes.

Built on the GPU by two small launches, with static shapes and without any host synchronisation,
once per step and shared by all layers. A step's batch becomes *work items*; every item is run
once per KV head:

- a prefix item: up to ``lanes`` members of one group x one split of the group's prefix;
- a suffix item: one request x one split of the tokens after its shared prefix (of all its tokens
  where it has no group, or where sharing does not pay).

Each request's results come in ``part_count[i]`` parts, at ``part_base[i]`` onwards in the
workspace. One part means that the item writes the output itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ITEM_FIELDS = 8
"""int32 fields of a work item.

0: kind: suffix, small prefix tile or large prefix tile (``KIND_*``). 1: row of ``req_to_token``
(suffix). 2: position in that row (suffix), or in the prefix slots. 3: tokens. 4: request
(suffix), or first entry in ``members``. 5: members. 6: suffix: the part to write, -1 for the
output itself; prefix: the split.
"""

SUFFIX_WAVES = 8
"""Suffix items per program wanted, by which long suffixes are split. (Of prefix items one, or
three where little suffix work can fill gaps.)"""
MIN_SPLIT = tl.constexpr(256)
"""Fewest tokens a split is cut for: below, an item's fixed cost is more than what balance gains."""
MERGE_TOKENS = tl.constexpr(16)
"""Tokens that a program reads in the time of merging one part: L tokens in splits of S take
S + MERGE_TOKENS * L / S, least at sqrt(MERGE_TOKENS * L)."""
MIN_SAVED_TOKENS = 240
"""Fewest saved token reads, (members - 1) * prefix tokens, for which a group shares."""

BLOCKS = (256, 1024, 4096)
"""Batch sizes that the plan is compiled for: not for each that is captured. Beyond, powers of 2."""

KIND_SUFFIX = tl.constexpr(0)
KIND_SMALL = tl.constexpr(1)
KIND_LARGE = tl.constexpr(2)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def _split_size(length, split):
    """Tokens per split when ``length`` is cut evenly into splits of at most ``split`` tokens."""
    parts = tl.maximum((length + split - 1) // split, 1)
    even = (length + parts - 1) // parts
    return tl.maximum((even + 63) // 64 * 64, 64)


@triton.jit
def _count_parts(length, split):
    """Splits of at most ``split`` tokens that ``length`` is cut into."""
    step = _split_size(length, split)
    return (length + step - 1) // step


# A step in which prefill and decode mix has any batch size: one compilation must do for all.
@triton.jit(do_not_specialize=["batch_size"])
def _plan_kernel(
    rows_ptr,
    seq_lens_ptr,
    group_id_ptr,
    prefix_len_ptr,
    header_ptr,
    group_ptr,
    request_ptr,
    batch_size,
    num_groups,
    slot_capacity,
    wave_items,
    suffix_target,
    min_saved_tokens,
    LANES_SMALL: tl.constexpr,
    LANES_LARGE: tl.constexpr,
    STRIDE_B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program: count members, choose the groups that share and the split sizes, lay out.

    ``group_ptr`` is int32 [5, BLOCK_G]: members, prefix tokens (0 = the group does not share),
    first snapshot slot, first member entry, first item. ``request_ptr`` is int32 [5, STRIDE_B]:
    rank in the group, first part, parts, first item, suffix start. ``header_ptr``: as WorkList.
    """
    g = tl.arange(0, BLOCK_G)
    b = tl.arange(0, BLOCK_B)
    count_ptr = group_ptr
    length_ptr = group_ptr + BLOCK_G
    tl.store(count_ptr + g, tl.zeros([BLOCK_G], tl.int32))
    tl.debug_barrier()

    in_batch = b < batch_size
    row = tl.load(rows_ptr + b, mask=in_batch, other=0).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + b, mask=in_batch, other=0).to(tl.int32)
    group = tl.load(group_id_ptr + row, mask=in_batch, other=0)
    prefix = tl.load(prefix_len_ptr + row, mask=in_batch, other=0)
    grouped = in_batch & (group > 0) & (group < num_groups) & (prefix > 0) & (prefix < seq_len)
    group = tl.where(grouped, group, 0)
    rank = tl.atomic_add(count_ptr + group, 1, mask=grouped)
    tl.store(length_ptr + group, prefix, mask=grouped)
    tl.debug_barrier()

    # volatile: the counts were changed behind this SM's L1 cache.
    members = tl.load(count_ptr + g, volatile=True)
    length = tl.load(length_ptr + g, mask=members > 0, other=0, volatile=True)
    shares = (members > 1) & ((members - 1) * length.to(tl.int64) >= min_saved_tokens)
    # A group whose slots do not fit the snapshot is served like singletons.
    slot_end = tl.cumsum(tl.where(shares, length, 0).to(tl.int64), 0)
    shares = shares & (slot_end <= slot_capacity)
    length = tl.where(shares, length, 0)
    members = tl.where(shares, members, 0)
    lanes = tl.where(members <= LANES_SMALL, LANES_SMALL, LANES_LARGE)
    tiles = (members + lanes - 1) // lanes
    prefix_work = tl.sum(tiles.to(tl.int64) * length)
    tl.debug_barrier()
    tl.store(length_ptr + g, length)
    tl.debug_barrier()

    shared = tl.load(length_ptr + group, mask=grouped, other=0, volatile=True)
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
        items = tl.sum(tiles * _count_parts(length, split))
        items += tl.sum(tl.where(in_batch, tl.maximum(_count_parts(suffix, split), 1), 0))
        one_wave = items <= wave_items
        split = tl.where(one_wave, split, split + (split // 8 + 63) // 64 * 64)
    prefix_split = tl.where(one_wave, split, prefix_split)
    suffix_split = tl.where(one_wave, split, suffix_split)

    items = tiles * _count_parts(length, prefix_split)
    tl.store(group_ptr + 2 * BLOCK_G + g, (slot_end - length).to(tl.int32))
    tl.store(group_ptr + 3 * BLOCK_G + g, tl.cumsum(members, 0) - members)
    tl.store(group_ptr + 4 * BLOCK_G + g, tl.cumsum(items, 0) - items)
    num_prefix_items = tl.sum(items)

    # Requests without tokens (padding) still get an item: it writes zeros.
    suffix_parts = tl.where(in_batch, tl.maximum(_count_parts(suffix, suffix_split), 1), 0)
    parts = suffix_parts + _count_parts(shared, prefix_split)
    first_item = num_prefix_items + tl.cumsum(suffix_parts, 0) - suffix_parts
    tl.store(request_ptr + b, rank)
    tl.store(request_ptr + STRIDE_B + b, tl.cumsum(parts, 0) - parts)
    tl.store(request_ptr + 2 * STRIDE_B + b, parts)
    tl.store(request_ptr + 3 * STRIDE_B + b, first_item)
    tl.store(request_ptr + 4 * STRIDE_B + b, shared)
    tl.store(header_ptr, num_prefix_items + tl.sum(suffix_parts))
    tl.store(header_ptr + 1, prefix_split)
    tl.store(header_ptr + 2, suffix_split)
    tl.store(header_ptr + 3, num_prefix_items)


@triton.jit
def _store_item(item_ptr, index, kind, source, start, tokens, member_start, members, part):
    """Write one work item (ITEM_FIELDS)."""
    f = tl.arange(0, 8)
    value = tl.where(f == 0, kind, 0)
    value = tl.where(f == 1, source, value)
    value = tl.where(f == 2, start, value)
    value = tl.where(f == 3, tokens, value)
    value = tl.where(f == 4, member_start, value)
    value = tl.where(f == 5, members, value)
    value = tl.where(f == 6, part, value)
    tl.store(item_ptr + index * 8 + f, value.to(tl.int32))


@triton.jit
def _emit_kernel(
    rows_ptr,
    seq_lens_ptr,
    group_id_ptr,
    req_to_token_ptr,
    req_to_token_stride,
    header_ptr,
    group_ptr,
    request_ptr,
    item_ptr,
    member_ptr,
    slot_ptr,
    LANES_SMALL: tl.constexpr,
    LANES_LARGE: tl.constexpr,
    STRIDE_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    """One program per request: its suffix items, its share of its group's items and slots."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + i).to(tl.int32)
    prefix_split = tl.load(header_ptr + 1)
    suffix_split = tl.load(header_ptr + 2)
    base = tl.load(request_ptr + STRIDE_B + i)
    parts = tl.load(request_ptr + 2 * STRIDE_B + i)
    first_item = tl.load(request_ptr + 3 * STRIDE_B + i)
    shared = tl.load(request_ptr + 4 * STRIDE_B + i)

    suffix = seq_len - shared
    step = _split_size(suffix, suffix_split)
    suffix_parts = tl.maximum((suffix + step - 1) // step, 1)
    prefix_parts = parts - suffix_parts
    for s in range(suffix_parts):
        start = s * step
        tokens = tl.maximum(tl.minimum(suffix - start, step), 0)
        part = tl.where(parts == 1, -1, base + prefix_parts + s)
        source = row.to(tl.int32)
        _store_item(
            item_ptr, first_item + s, KIND_SUFFIX, source, shared + start, tokens, i, 1, part
        )

    if shared > 0:
        group = tl.load(group_id_ptr + row)
        rank = tl.load(request_ptr + i)
        members = tl.load(group_ptr + group)
        first_slot = tl.load(group_ptr + 2 * BLOCK_G + group)
        first_member = tl.load(group_ptr + 3 * BLOCK_G + group)
        first_item = tl.load(group_ptr + 4 * BLOCK_G + group)
        tl.store(member_ptr + first_member + rank, i)
        step = _split_size(shared, prefix_split)
        small = members <= LANES_SMALL
        lanes = tl.where(small, LANES_SMALL, LANES_LARGE)
        kind = tl.where(small, KIND_SMALL, KIND_LARGE)
        tiles = (members + lanes - 1) // lanes
        for t in range(rank, tiles * prefix_parts, members):
            part = t // tiles
            lane = (t % tiles) * lanes
            start = part * step
            _store_item(
                item_ptr,
                first_item + t,
                kind,
                0,
                first_slot + start,
                tl.minimum(shared - start, step),
                first_member + lane,
                tl.minimum(members - lane, lanes),
                part,
            )
        # Members hold the same prefix slots, so each copies one stretch from its own row.
        stretch = (shared + members - 1) // members
        begin = rank * stretch
        end = tl.minimum(begin + stretch, shared)
        source = req_to_token_ptr + row * req_to_token_stride
        for at in range(begin, end, BLOCK_COPY):
            position = at + tl.arange(0, BLOCK_COPY)
            valid = position < end
            slots = tl.load(source + position, mask=valid, other=0)
            tl.store(slot_ptr + first_slot + position, slots.to(tl.int32), mask=valid)


@dataclass(frozen=True)
class WorkListConfig:
    """What the list is cut for.

    lanes_small, lanes_large: members per query tile of the two tile sizes; num_programs: programs
    of the launch; min_saved_tokens: a group shares if (members - 1) * prefix tokens reach it.
    """

    num_kv_heads: int
    lanes_small: int
    lanes_large: int
    num_programs: int
    min_saved_tokens: int = MIN_SAVED_TOKENS


class WorkList:
    """Device buffers of the work list, for batches of up to ``max_batch`` requests.

    items: int32 [item capacity, ITEM_FIELDS]; header: int32 [4]: items, tokens per prefix split
    and per suffix split at most, prefix items; members: int32 [max_batch], the batch positions of
    group members, group by group; slots: int32, the shared prefixes' KV slots; part_base,
    part_count: int32 [max_batch].

    The prefixes' slots are copied, 4 bytes a token, since SGLang's overlap scheduler may give a
    finished request's row of ``req_to_token`` to another request while a captured graph still
    runs: the row that a group's slots were read from could be that one. A live request's own
    suffix slots never move.
    """

    def __init__(
        self,
        config: WorkListConfig,
        max_batch: int,
        num_rows: int,
        slot_capacity: int,
        device: torch.device | str,
    ) -> None:
        self.config = config
        self.max_batch = max_batch
        self.max_block = next_power_of_2(max(max_batch, 16))
        self.block_g = next_power_of_2(max(num_rows + 1, 16))
        self.num_groups = num_rows + 1
        self.slot_capacity = slot_capacity
        self.wave_items = max(config.num_programs // config.num_kv_heads, 1)
        self.suffix_target = self.wave_items * SUFFIX_WAVES
        # sum ceil(length / split) <= batch + work / split, and work / split <= target (three
        # times that for prefixes); a prefix part exists once per member, at most lanes_large
        # members a tile.
        prefix_splits = 3 * self.wave_items
        self.item_capacity = 2 * max_batch + prefix_splits + self.suffix_target
        self.part_capacity = 2 * max_batch + self.suffix_target + prefix_splits * config.lanes_large

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.header = buffer(4)
        self.items = buffer(self.item_capacity, ITEM_FIELDS)
        self.members = buffer(max_batch)
        self.slots = buffer(max(slot_capacity, 1))
        self.groups = buffer(5, self.block_g)
        self.requests = buffer(5, self.max_block)
        self.part_base = self.requests[1]
        self.part_count = self.requests[2]

    def build(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        group_id: torch.Tensor,
        prefix_len: torch.Tensor,
        req_to_token: torch.Tensor,
    ) -> None:
        """Queue the two launches that fill the list for a batch.

        rows, seq_lens: integer [batch]; group_id, prefix_len: int32 [num_rows]; req_to_token: int32
        [num_rows, max context], of which only the shared prefixes are read here.
        """
        batch = rows.shape[0]
        config = self.config
        fitting = next((block for block in BLOCKS if batch <= block), BLOCKS[-1])
        block_b = max(min(self.max_block, fitting), next_power_of_2(batch))
        _plan_kernel[(1,)](
            rows,
            seq_lens,
            group_id,
            prefix_len,
            self.header,
            self.groups,
            self.requests,
            batch,
            self.num_groups,
            self.slot_capacity,
            self.wave_items,
            self.suffix_target,
            config.min_saved_tokens,
            LANES_SMALL=config.lanes_small,
            LANES_LARGE=config.lanes_large,
            STRIDE_B=self.max_block,
            BLOCK_B=block_b,
            BLOCK_G=self.block_g,
            num_warps=16,  # pyright: ignore[reportCallIssue]
        )
        _emit_kernel[(batch,)](
            rows,
            seq_lens,
            group_id,
            req_to_token,
            req_to_token.stride(0),
            self.header,
            self.groups,
            self.requests,
            self.items,
            self.members,
            self.slots,
            LANES_SMALL=config.lanes_small,
            LANES_LARGE=config.lanes_large,
            STRIDE_B=self.max_block,
            BLOCK_G=self.block_g,
            BLOCK_COPY=256,
            num_warps=4,  # pyright: ignore[reportCallIssue]
        )
