"""The order of execution: depth-first, and subtrees with long outputs first."""

import numpy as np

from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.prefix_tree import PrefixTree, subtree_sums


def execution_starts(tree: PrefixTree, output_lens: np.ndarray) -> np.ndarray:
    """Position at which each node's subtree starts in the order of execution, int64[num_nodes].

    output_lens: int64[n], tokens each request is expected to decode.

    Each subtree is contiguous. At a node the requests that end there come first, then its
    child subtrees by their longest expected output, longer first: a batch takes at least as long
    as its last request, so the long ones must not start late (the rule of longest processing
    time first, Graham 1969). Where these are equal, as without any knowledge of lengths, the
    larger decoding ratio goes first (BatchLLM, arXiv 2412.03594, orders its groups so): the
    subtree's expected output tokens over its distinct prompt tokens below the node. Equals go by
    their smallest request index.
    """
    parent = tree.parent.tolist()
    outputs = np.zeros(tree.num_nodes, np.int64)
    np.add.at(outputs, tree.request_node, output_lens)
    ratio = np.array(subtree_sums(parent, outputs.tolist())[1:], np.float64) / np.array(
        subtree_sums(parent, tree.edge_len.tolist())[1:], np.float64
    )
    smallest = np.full(tree.num_nodes, len(tree.request_node), np.int64)
    np.minimum.at(smallest, tree.request_node, np.arange(len(tree.request_node)))
    longest = np.zeros(tree.num_nodes, np.int64)
    np.maximum.at(longest, tree.request_node, output_lens)
    for node in range(tree.num_nodes - 1, 0, -1):
        smallest[parent[node]] = min(smallest[parent[node]], smallest[node])
        longest[parent[node]] = max(longest[parent[node]], longest[node])

    # Children by parent, and parents come before their own children: one pass places them all.
    siblings = np.lexsort((smallest[1:], -ratio, -longest[1:], tree.parent[1:])) + 1
    starts = [0] * tree.num_nodes
    free = tree.end_count.tolist()  # next free position inside each placed subtree
    num_requests = tree.num_requests.tolist()
    for node in siblings.tolist():
        up = parent[node]
        starts[node] = free[up]
        free[node] += free[up]
        free[up] += num_requests[node]
    return np.array(starts, np.int64)


def order_of(tree: PrefixTree, starts: np.ndarray) -> np.ndarray:
    """Request indices in order of execution, int64[n], from `execution_starts`."""
    # Two nodes that start together never both end requests: the upper one has none of its own.
    return np.argsort(starts[tree.request_node], kind="stable")


def longest_earlier_prefix(
    tree: PrefixTree, starts: np.ndarray, order: np.ndarray, page_size: int
) -> np.ndarray:
    """Tokens, in whole pages, that each request shares with an earlier one; int64[n].

    Depth-first, the longest such prefix is the one shared with the request just before, and
    that is where the highest subtree that starts with the request hangs; a request that starts
    no subtree repeats the prompt before it.
    """
    shared = tree.depth[tree.request_node[order]]
    np.minimum.at(shared, starts[1:], tree.depth[tree.parent[1:]])
    by_request = np.empty_like(shared)
    by_request[order] = floor_to_page(shared, page_size)
    return by_request
