"""The work list of a decode step: which (queries, KV tokens) pairs one attention launch computes.

Built on the GPU by two small launches, with static shapes and without any host synchronisation,
once per step and shared by all layers. A step's batch becomes *work items*, run once per KV head
or once per several:

- a prefix item: up to ``lanes`` members of a node x one split of the tokens that they read
  together (`levels.py` says which nodes do);
- a suffix item: one request x one split of the tokens after those (of all its tokens where it
  shares none, or where sharing does not pay).

Each request's results come in ``part_count[i]`` parts, at ``part_base[i]`` onwards in the
workspace. One part means that the item writes the output itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_batchllm.attention.groups import LEVELS
from sglang_batchllm.attention.items import (
    ITEM_FIELDS,
    KIND_LARGE,
    KIND_SMALL,
    KIND_SUFFIX,
    KIND_WIDE,
    split_size,
    store_item,
)
from sglang_batchllm.attention.levels import GROUP_FIELDS, REQUEST_FIELDS, plan_kernel

SUFFIX_WAVES = 8
"""Suffix items per program wanted, by which long suffixes are split. (Of prefix items one, or
three where little suffix work can fill gaps.)"""
MIN_SAVED_TOKENS = 240
"""Fewest saved token reads for which a node is read together."""
PART_TOKENS = 16
"""Saved token reads that one more part of a member has to pay for."""
WIDE_TOKENS = 256
"""Most tokens of a suffix whose KV heads are taken several at a time."""
MEMBERSHIPS = 3
"""Nodes that are read together on a request's path, on the average of all, at most."""

MANY_REQUESTS = 128
"""Batches of so many run in other tiles (`fused.KernelConfigs`)."""

BLOCKS = (256, 1024, 4096)
"""Batch sizes that the plan is compiled for: not for each that is captured. Beyond, powers of 2."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit(do_not_specialize=["levels"])
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
    levels,
    num_rows,
    LANES_SMALL: tl.constexpr,
    LANES_LARGE: tl.constexpr,
    STRIDE_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    """One program per request: its suffix items, its share of its nodes' items and slots."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + i).to(tl.int32)
    prefix_split = tl.load(header_ptr + 1)
    suffix_split = tl.load(header_ptr + 2)
    base = tl.load(request_ptr + i)
    parts = tl.load(request_ptr + STRIDE_B + i)
    first_item = tl.load(request_ptr + 2 * STRIDE_B + i)
    shared = tl.load(request_ptr + 3 * STRIDE_B + i)
    wide = tl.load(request_ptr + 4 * STRIDE_B + i)

    suffix = seq_len - shared
    step = tl.where(wide > 0, tl.maximum(suffix, 1), split_size(suffix, suffix_split))
    suffix_parts = tl.maximum((suffix + step - 1) // step, 1)
    prefix_parts = parts - suffix_parts
    kind = tl.where(wide > 0, KIND_WIDE, KIND_SUFFIX)
    for s in range(suffix_parts):
        start = s * step
        tokens = tl.maximum(tl.minimum(suffix - start, step), 0)
        part = tl.where(parts == 1, -1, base + prefix_parts + s)
        source = row.to(tl.int32)
        store_item(item_ptr, first_item + s, kind, source, shared + start, tokens, i, 1, part)

    for level in range(levels):
        rank = tl.load(request_ptr + (REQUEST_FIELDS + level) * STRIDE_B + i)
        if rank >= 0:
            group = tl.load(group_id_ptr + level * num_rows + row)
            node_ptr = group_ptr + level * GROUP_FIELDS * BLOCK_G + group
            members = tl.load(node_ptr)
            tiles = tl.load(node_ptr + BLOCK_G)
            begin = tl.load(node_ptr + 3 * BLOCK_G)
            length = tl.load(node_ptr + 2 * BLOCK_G)
            first_slot = tl.load(node_ptr + 4 * BLOCK_G)
            first_member = tl.load(node_ptr + 5 * BLOCK_G)
            first_item = tl.load(node_ptr + 6 * BLOCK_G)
            first_part = tl.load(node_ptr + 7 * BLOCK_G)
            tl.store(member_ptr + first_member + rank, i)
            step = split_size(length, prefix_split)
            small = members <= LANES_SMALL
            lanes = tl.where(small, LANES_SMALL, LANES_LARGE)
            kind = tl.where(small, KIND_SMALL, KIND_LARGE)
            splits = (length + step - 1) // step
            for t in range(rank, tiles * splits, members):
                part = t // tiles
                lane = (t % tiles) * lanes
                start = part * step
                store_item(
                    item_ptr,
                    first_item + t,
                    kind,
                    begin + start,
                    first_slot + start,
                    tl.minimum(length - start, step),
                    first_member + lane,
                    tl.minimum(members - lane, lanes),
                    first_part + part,
                )
            # Members hold the same slots, so each copies one stretch from its own row.
            stretch = (length + members - 1) // members
            stretch_end = tl.minimum((rank + 1) * stretch, length)
            source = req_to_token_ptr + row * req_to_token_stride + begin
            for at in range(rank * stretch, stretch_end, BLOCK_COPY):
                position = at + tl.arange(0, BLOCK_COPY)
                valid = position < stretch_end
                slots = tl.load(source + position, mask=valid, other=0)
                tl.store(slot_ptr + first_slot + position, slots.to(tl.int32), mask=valid)


@dataclass(frozen=True)
class WorkListConfig:
    """What the list is cut for.

    lanes_small, lanes_large: members per query tile of the two tile sizes; num_programs: programs
    of the launch; many_programs: of one of `MANY_REQUESTS`, no more than those; window: tokens that
    a query sees, its own the last, None for all; the others: see the constants above, which they
    are by default.
    """

    num_kv_heads: int
    lanes_small: int
    lanes_large: int
    num_programs: int
    many_programs: int
    min_saved_tokens: int = MIN_SAVED_TOKENS
    part_tokens: int = PART_TOKENS
    wide_tokens: int = WIDE_TOKENS
    window: int | None = None

    def programs_for(self, batch_size: int) -> int:
        return self.many_programs if batch_size >= MANY_REQUESTS else self.num_programs

    def wave_items(self, programs: int) -> int:
        """Items that run at once."""
        return max(programs // self.num_kv_heads, 1)


class WorkList:
    """Device buffers of the work list, for batches of up to ``max_batch`` requests.

    items: int32 [item capacity, ITEM_FIELDS]; header: int32 [4]: items, tokens per prefix split
    and per suffix split at most, items before the wide ones; members: int32, the batch positions of
    the nodes' members, node by node; slots: int32, the KV slots that are read together; part_base,
    part_count: int32 [max_batch]. window_start: int32 [max_batch], positions, where there is one.

    The shared slots are copied, 4 bytes a token, since SGLang's overlap scheduler may give a
    finished request's row of ``req_to_token`` to another request while a captured graph still
    runs: the row that a node's slots were read from could be that one. A live request's own
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
        self.member_capacity = MEMBERSHIPS * max_batch
        wave_items = config.wave_items(config.num_programs)
        suffix_target = wave_items * SUFFIX_WAVES
        # sum ceil(length / split) <= nodes + work / split, and work / split <= target (three
        # times that for prefixes); a prefix part exists once per member, at most lanes_large
        # members a tile.
        prefix_splits = 3 * wave_items
        once = max_batch + self.member_capacity
        self.item_capacity = once + prefix_splits + suffix_target
        self.part_capacity = once + suffix_target + prefix_splits * config.lanes_large

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.header = buffer(4)
        self.items = buffer(self.item_capacity, ITEM_FIELDS)
        self.members = buffer(self.member_capacity)
        self.slots = buffer(max(slot_capacity, 1))
        self.groups = buffer(LEVELS, GROUP_FIELDS.value, self.block_g)
        self.requests = buffer(REQUEST_FIELDS.value + LEVELS, self.max_block)
        self.part_base = self.requests[0]
        self.part_count = self.requests[1]
        self.window_start = self.requests[5]

    def build(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        group_id: torch.Tensor,
        prefix_len: torch.Tensor,
        req_to_token: torch.Tensor,
        levels: int,
    ) -> None:
        """Queue the two launches that fill the list for a batch.

        rows, seq_lens: integer [batch]; group_id, prefix_len: int32 [levels, num_rows], see
        `GroupTable`; req_to_token: int32 [num_rows, max context], of which only what is read
        together is read here. levels: how many of them are in use.
        """
        batch = rows.shape[0]
        config = self.config
        wave_items = config.wave_items(config.programs_for(batch))
        fitting = next((block for block in BLOCKS if batch <= block), BLOCKS[-1])
        block_b = max(min(self.max_block, fitting), next_power_of_2(batch))
        num_rows = group_id.shape[1]
        tiles = {
            "LANES_SMALL": config.lanes_small,
            "LANES_LARGE": config.lanes_large,
            "STRIDE_B": self.max_block,
            "BLOCK_G": self.block_g,
        }
        plan_kernel[(1,)](
            rows,
            seq_lens,
            group_id,
            prefix_len,
            self.header,
            self.groups,
            self.requests,
            batch,
            levels,
            num_rows,
            self.num_groups,
            self.slot_capacity,
            self.member_capacity,
            wave_items,
            SUFFIX_WAVES * wave_items,
            config.min_saved_tokens,
            config.part_tokens,
            config.wide_tokens,
            config.window or 0,
            BLOCK_B=block_b,
            WINDOWED=config.window is not None,
            num_warps=16,  # pyright: ignore[reportCallIssue]
            **tiles,
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
            levels,
            num_rows,
            BLOCK_COPY=256,
            num_warps=4,  # pyright: ignore[reportCallIssue]
            **tiles,
        )
