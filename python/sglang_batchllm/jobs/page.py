"""`write_page`: the prefix tree of a batch and its groups as one HTML page that needs no network.

`page.html` draws what is chosen here: `MAX_BLOCKS` blocks at most, whatever the batch.
"""

import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_batchllm.planning import BatchPlan

MAX_BLOCKS = 5_000
TEXT_TOKENS = 500_000
"""Tokens of text in a page; long texts are cut evenly to hold it."""

_CHARS_PER_TOKEN = 8  # some tokens are a hundred spaces
_NAMES = 5
_NAME_CHARS = 80
_BINS = 24


@dataclass(frozen=True)
class _Block:
    """A bar of the picture: a node of the tree, or neighbouring children of one drawn as one.

    node: the node; of children drawn as one, the first of them.
    branches: children drawn as one, 0 for a node by itself. shared: those of several requests.
    first: position of its first request in order of execution.
    start, end: tokens from the root; end is that of the text of `node`.
    """

    node: int
    branches: int
    shared: int
    first: int
    requests: int
    start: int
    end: int


def write_page(
    path: Path,
    plan: BatchPlan,
    tokens_of: Callable[[int, int, int], np.ndarray],
    text_of: Callable[[np.ndarray], str],
    name_of: Callable[[int], str],
    title: str,
) -> None:
    """Write the page to `path`.

    tokens_of(request, start, end): token ids of that request's prompt. text_of: decodes ids.
    name_of(request): its custom_id.
    """
    tree, order = plan.tree, plan.order
    lens = plan.prompt_lens[order]
    saved = lens - plan.to_compute[order]
    ends_at = tree.request_node[order]
    last_shared = np.where(tree.num_requests[ends_at] > 1, ends_at, tree.parent[ends_at])
    # The root stands for no group, whose index is -1.
    grouped = np.append(plan.groups.node, 0)[plan.group_of][order]
    ends = np.stack([tree.depth[grouped], tree.depth[last_shared], lens])
    group_at = {int(node): index for index, node in enumerate(plan.groups.node)}

    blocks = _choose_blocks(plan)
    text_limit = _fair_share(np.array([block.end - block.start for block in blocks]), TEXT_TOKENS)
    number = {block.node: index for index, block in enumerate(blocks) if not block.branches}
    rows: list[dict[str, Any]] = []
    for block in blocks:
        row: dict[str, Any] = {
            "parent": number.get(int(tree.parent[block.node]), -1),
            "first": block.first,
            "requests": block.requests,
            "start": block.start,
            "end": block.end,
        }
        here = slice(block.first, block.first + block.requests)
        most = None if block.branches else block.end - block.start
        row["saved"] = int(np.clip(saved[here] - block.start, 0, most).sum())
        if block.branches:
            beyond = np.maximum(ends[:, here] - block.start, 0)
            row["branches"], row["shared"] = block.branches, block.shared
            row["median"], row["longest"] = float(np.median(beyond[2])), int(beyond[2].max())
            row["profile"] = _means(beyond).round(1).tolist()
        else:
            row["ends"] = int(tree.end_count[block.node])
        if not block.branches and block.node in group_at:
            group = group_at[block.node]
            row["group"] = group
            row["members"] = int(plan.groups.size[group])
            row["prefix"] = int(plan.groups.prefix_len[group])
        if block.end > block.start:
            shown = min(block.end, block.start + text_limit)
            text = _valid(text_of(tokens_of(int(order[block.first]), block.start, shown)))
            row["text"] = text[: _CHARS_PER_TOKEN * text_limit]
            if shown < block.end or len(row["text"]) < len(text):
                row["cut"] = True
        row["names"] = [_valid(name_of(int(i)))[:_NAME_CHARS] for i in order[here][:_NAMES]]
        rows.append(row)

    page_size = plan.page_size
    figures = plan.report.to_dict()
    figures["deepest_kv_tokens"] = -(-int(lens.max(initial=0)) // page_size) * page_size
    data = {"title": _valid(title), "figures": figures, "blocks": rows}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # Nothing in a prompt may end the script element it stands in.
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    path.write_text(template.replace("__PLAN__", text.replace("<", "\\u003c")), encoding="utf-8")


def _choose_blocks(plan: BatchPlan) -> list[_Block]:
    """At most `MAX_BLOCKS`, from top to bottom, each after the one left of it."""
    first = _first_rows(plan)
    room = MAX_BLOCKS
    while len(blocks := _blocks_within(plan, first, room)) > MAX_BLOCKS:
        room = room * 4 // 5  # many children drawn as one, between those by themselves
    return blocks


def _blocks_within(plan: BatchPlan, first: np.ndarray, room: int) -> list[_Block]:
    """`room` nodes as blocks by themselves, half of it for shared ones; all others in runs."""
    tree = plan.tree
    alone = tree.num_requests == 1
    alone[0] = False
    # A parent comes before its children in this order, so what is kept hangs together.
    shared = np.flatnonzero(~alone)
    by_size = shared[np.lexsort((first[shared], -tree.num_requests[shared]))]
    kept = np.zeros(tree.num_nodes, bool)
    kept[by_size[: room // 2]] = True

    children = np.flatnonzero(kept[tree.parent])
    children = children[children > 0]
    children = children[np.lexsort((first[children], tree.parent[children]))]
    leaves = children[alone[children]]
    _, starts, counts = np.unique(tree.parent[leaves], return_index=True, return_counts=True)
    rank = np.arange(len(leaves)) - np.repeat(starts, counts)
    kept[leaves[rank < _fair_share(counts, room - int(kept.sum()))]] = True

    hidden = ~kept[children]
    parents = tree.parent[children]
    begins = hidden.copy()
    begins[1:] &= ~hidden[:-1] | (parents[1:] != parents[:-1])
    runs = np.split(children[hidden], np.flatnonzero(begins[hidden])[1:]) if hidden.any() else []

    start = tree.depth - tree.edge_len
    blocks = [
        _Block(node, 0, 0, row, requests, begin, end)
        for node, row, requests, begin, end in zip(
            np.flatnonzero(kept).tolist(),
            *(of[kept].tolist() for of in (first, tree.num_requests, start, tree.depth)),
            strict=True,
        )
    ]
    for run in runs:
        node, requests = int(run[0]), int(tree.num_requests[run].sum())
        shape = int(first[node]), requests, int(start[node]), int(tree.depth[node])
        blocks.append(_Block(node, len(run), int((~alone[run]).sum()), *shape))
    # Of two that begin with the same request, the one above ends earlier.
    return sorted(blocks, key=lambda block: (block.first, block.end))


def _first_rows(plan: BatchPlan) -> np.ndarray:
    """Position of each subtree's first request in order of execution, int64[num_nodes]."""
    first = np.full(plan.tree.num_nodes, len(plan.order), np.int64)
    np.minimum.at(first, plan.tree.request_node[plan.order], np.arange(len(plan.order)))
    rows, parent = first.tolist(), plan.tree.parent.tolist()
    for node in range(len(rows) - 1, 0, -1):
        rows[parent[node]] = min(rows[parent[node]], rows[node])
    return np.array(rows, np.int64)


def _fair_share(sizes: np.ndarray, budget: int) -> int:
    """The largest limit, up to `budget`, with which sum(min(sizes, limit)) <= budget."""
    return bisect_right(range(budget + 1), budget, key=lambda at: np.minimum(sizes, at).sum()) - 1


def _means(values: np.ndarray) -> np.ndarray:
    """Means of `_BINS` stretches, or fewer, of each row's values; float64[rows, bins]."""
    count = values.shape[1]
    bounds = np.linspace(0, count, min(count, _BINS) + 1).astype(np.int64)
    return np.add.reduceat(values, bounds[:-1], axis=1) / np.diff(bounds)


def _valid(text: str) -> str:
    """`text` with what UTF-8 cannot write, lone surrogates, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
