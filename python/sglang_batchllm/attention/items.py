"""What a work item is, and how tokens are cut into items."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""Softmax is in base 2."""
ITEM_FIELDS = 8
"""int32 fields of a work item.

0: kind (``KIND_*``). 1: row of ``req_to_token`` (suffix), or the first token's position in its
members' rows. 2: position in that row (suffix), or in the prefix slots. 3: tokens. 4: request
(suffix), or first entry in ``members``. 5: members. 6: the part to write, suffix: -1 for the output
itself; prefix: after each member's first.
"""

KIND_SUFFIX = tl.constexpr(0)
"""One request's own tokens, one KV head a ticket."""
KIND_SMALL = tl.constexpr(1)
"""A shared stretch for few members."""
KIND_LARGE = tl.constexpr(2)
"""A shared stretch for more members."""
KIND_WIDE = tl.constexpr(3)
"""One request's few own tokens, several KV heads a ticket: a ticket's fixed cost is that of some
dozens of tokens."""


@triton.jit
def split_size(length, split):
    """Tokens per split when ``length`` is cut evenly into splits of at most ``split`` tokens."""
    parts = tl.maximum((length + split - 1) // split, 1)
    even = (length + parts - 1) // parts
    return tl.maximum((even + 63) // 64 * 64, 64)


@triton.jit
def count_parts(length, split):
    """Splits of at most ``split`` tokens that ``length`` is cut into."""
    step = split_size(length, split)
    return (length + step - 1) // step


@triton.jit
def store_item(item_ptr, index, kind, source, start, tokens, member_start, members, part):
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
