"""The compressed prefix tree (radix tree) of a batch, as flat arrays."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.tokens import EncodedPrompts


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Nodes in depth-first order: node 0 is the root, and parent[v] < v for every other node.

    Only whole pages can be shared, so prompts part at their longest common prefix rounded down
    to whole pages, while a prompt ends at a node of its full length. Equal prompts end at the
    same node. Every leaf ends at least one request; the root ends none.

    parent: int32[num_nodes], -1 for the root.
    depth: int64[num_nodes], tokens from the root to the node's end.
    end_count: int32[num_nodes], requests whose prompt ends exactly there.
    num_requests: int32[num_nodes], requests in the subtree.
    request_node: int32[n], the node at which each request's prompt ends.
    """

    parent: np.ndarray
    depth: np.ndarray
    end_count: np.ndarray
    num_requests: np.ndarray
    request_node: np.ndarray

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def edge_len(self) -> np.ndarray:
        """int64[num_nodes], tokens between a node's parent and the node; 0 for the root."""
        edges = self.depth - self.depth[self.parent]
        edges[0] = 0
        return edges


def subtree_sums(parent: Sequence[int], values: Sequence[int]) -> list[int]:
    """Sum `values` (one per node) over each node's subtree. A loop, so depth is no limit."""
    sums = list(values)
    for node in range(len(sums) - 1, 0, -1):
        sums[parent[node]] += sums[node]
    return sums


def build_prefix_tree(
    prompts: EncodedPrompts, page_size: int, namespaces: Sequence[Hashable] | None
) -> PrefixTree:
    """Build the tree of `prompts`; prompts of different namespaces part at the root.

    Sort, take the longest common prefix of each two neighbours, and build the tree in one pass
    with a stack that holds the path to the last prompt. Apart from the sort, time is linear in
    tokens; nothing recurses.
    """
    in_order = list(range(len(prompts.keys)))
    in_order.sort(key=prompts.keys.__getitem__)
    if namespaces is not None:
        ranks: dict[Hashable, int] = {}
        rank_of = [ranks.setdefault(space, len(ranks)) for space in namespaces]
        in_order.sort(key=rank_of.__getitem__)  # stable: keeps the order by prefix within each
    else:
        rank_of = [0] * len(in_order)

    # Nodes as they appear; `first` is the position in sorted order of the subtree's first prompt.
    depth, parent, first, end_count = [0], [-1], [0], [0]

    def add_node(node_depth: int, node_parent: int, node_first: int, ends: int) -> int:
        depth.append(node_depth)
        parent.append(node_parent)
        first.append(node_first)
        end_count.append(ends)
        return len(depth) - 1

    lens = prompts.lens.tolist()
    end_node = np.zeros(len(in_order), np.int64)
    path = [0]
    previous = -1
    for position, prompt in enumerate(in_order):
        common = 0
        if position and rank_of[prompt] == rank_of[previous]:
            common = _common_prefix(prompts.tokens(previous), prompts.tokens(prompt))
        if position and common == lens[prompt] == lens[previous]:
            end_count[path[-1]] += 1
        else:
            branch_depth = floor_to_page(common, page_size)
            below = -1
            while depth[path[-1]] > branch_depth:
                below = path.pop()
            if depth[path[-1]] < branch_depth:
                parent[below] = add_node(branch_depth, path[-1], first[below], 0)
                path.append(parent[below])
            path.append(add_node(lens[prompt], path[-1], position, 1))
        end_node[prompt] = path[-1]
        previous = prompt

    # Depth-first order: along one path by depth, then by the first prompt underneath.
    preorder = np.lexsort((depth, first))
    number = np.empty_like(preorder)
    number[preorder] = np.arange(len(preorder))
    new_parent = number[np.array(parent)[preorder]].astype(np.int32)
    new_parent[0] = -1
    new_end_count = np.array(end_count, np.int32)[preorder]
    return PrefixTree(
        parent=new_parent,
        depth=np.array(depth, np.int64)[preorder],
        end_count=new_end_count,
        num_requests=np.array(subtree_sums(new_parent.tolist(), new_end_count.tolist()), np.int32),
        request_node=number[end_node].astype(np.int32),
    )


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    at = int(differs.argmax())
    return at if differs[at] else length
