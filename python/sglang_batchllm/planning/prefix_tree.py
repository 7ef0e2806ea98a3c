"""The compressed prefix tree (radix tree) of a batch, as flat arrays."""

import array
from dataclasses import dataclass

import numpy as np

from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.sorting import SortedPrompts


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

    def inner(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nodes that matter to several requests, and the leaves of one request each.

        In most batches nearly all nodes are such leaves. What concerns these is done with arrays,
        and loops go over the others only.

        Returns the inner nodes, which are the root and all but those leaves, rising; the place of
        each one's parent among them, 0 for the root; and the leaves, rising. All are int64 arrays.
        """
        is_leaf = (self.num_requests == 1) & (self.end_count == 1)
        inner = np.flatnonzero(~is_leaf)
        place = np.cumsum(~is_leaf) - 1
        above = place[self.parent[inner]]
        above[0] = 0
        return inner, above, np.flatnonzero(is_leaf)


def build_prefix_tree(prompts: SortedPrompts, lens: np.ndarray, page_size: int) -> PrefixTree:
    """Build the tree of sorted prompts in one pass, with a stack that holds the path to the last.

    lens: int64[n], tokens per prompt, by request. Time is linear in prompts; nothing recurses.
    """
    lengths, common = lens[prompts.order], prompts.common
    repeats = np.zeros(len(lengths), np.bool_)
    repeats[1:] = (common[1:] == lengths[1:]) & (common[1:] == lengths[:-1])
    # Equal prompts end at one node, so the rest is about the distinct ones; these are numbered.
    first_of = np.flatnonzero(~repeats)
    branches = floor_to_page(common[first_of], page_size)
    lengths = lengths[first_of]
    count = len(first_of)

    # The root, the ends of prompts, and then the branches as they appear; each node is that of the
    # prompts from its first up to the first one that is not under it.
    first = array.array("i", np.maximum(np.arange(-1, count, dtype=np.int32), 0).tobytes())
    until = array.array("i", bytes(4 * (count + 1)))
    parent = array.array("i", bytes(4 * (count + 1)))
    branch_depth = array.array("q")
    path, path_depth = [0], [0]
    for prompt, (branch, length) in enumerate(zip(branches.data, lengths.data, strict=True)):
        below = -1
        while path_depth[-1] > branch:
            below = path.pop()
            path_depth.pop()
            until[below] = prompt
        if path_depth[-1] < branch:
            parent.append(path[-1])
            path.append(len(first))
            parent[below] = len(first)
            first.append(first[below])
            until.append(0)
            branch_depth.append(branch)
            path_depth.append(branch)
        parent[prompt + 1] = path[-1]
        path.append(prompt + 1)
        path_depth.append(length)
    for node in path:
        until[node] = count

    # Depth-first order: along one path by depth, then by the first prompt underneath.
    firsts = np.frombuffer(first, np.int32)
    depths = np.concatenate([[0], lengths, np.frombuffer(branch_depth, np.int64)])
    preorder = np.lexsort((depths, firsts)).astype(np.int32)
    number = np.empty_like(preorder)
    number[preorder] = np.arange(len(preorder), dtype=np.int32)
    new_parent = number[np.frombuffer(parent, np.int32)[preorder]]
    new_parent[0] = -1
    end_nodes = number[1 : count + 1]
    starts = np.append(first_of, len(repeats))
    end_count = np.zeros(len(preorder), np.int32)
    end_count[end_nodes] = np.diff(starts)
    requests = starts[np.frombuffer(until, np.int32)] - starts[firsts]
    request_node = np.empty(len(repeats), np.int32)
    request_node[prompts.order] = end_nodes[np.cumsum(~repeats, dtype=np.int32) - 1]
    return PrefixTree(
        parent=new_parent,
        depth=depths[preorder],
        end_count=end_count,
        num_requests=requests[preorder].astype(np.int32),
        request_node=request_node,
    )
