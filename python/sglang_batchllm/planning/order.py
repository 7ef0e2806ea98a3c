"""The order of execution: depth-first, and subtrees with long outputs first."""

import numpy as np

from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.prefix_tree import PrefixTree


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
    ratio = _decoding_ratio(tree, output_lens)
    inner, above, leaves = tree.inner()
    up = above.tolist()
    smallest = np.full(tree.num_nodes, len(tree.request_node), np.int32)
    longest = np.zeros(tree.num_nodes, np.int64)
    request = np.arange(len(tree.request_node), dtype=np.int32)
    for nodes in (tree.request_node, tree.parent[tree.request_node]):
        np.minimum.at(smallest, nodes, request)
        np.maximum.at(longest, nodes, output_lens)
    smallest_below, longest_below = smallest[inner].tolist(), longest[inner].tolist()
    for node in range(len(up) - 1, 0, -1):
        over = up[node]
        smallest_below[over] = min(smallest_below[over], smallest_below[node])
        longest_below[over] = max(longest_below[over], longest_below[node])
    smallest[inner], longest[inner] = smallest_below, longest_below

    # From the start of its parent's subtree each starts behind what ends there and its elders.
    parent = tree.parent[1:]
    siblings = np.lexsort((smallest[1:], -ratio[1:], -longest[1:], parent))
    sizes = tree.num_requests[1:][siblings]
    elders = np.cumsum(sizes, dtype=np.int64) - sizes
    parent = parent[siblings]
    eldest = np.ones(len(parent), np.bool_)
    eldest[1:] = parent[1:] != parent[:-1]
    elders -= np.maximum.accumulate(np.where(eldest, elders, 0))
    starts = np.zeros(tree.num_nodes, np.int64)
    starts[siblings + 1] = elders + tree.end_count[parent]
    placed = starts[inner].tolist()
    for node in range(1, len(up)):
        placed[node] += placed[up[node]]
    starts[inner] = placed
    starts[leaves] += starts[tree.parent[leaves]]
    return starts


def _decoding_ratio(tree: PrefixTree, output_lens: np.ndarray) -> np.ndarray:
    """Expected output tokens over distinct prompt tokens of each subtree, float64[num_nodes]; 0
    for the root, which nothing is compared with."""
    outputs = np.zeros(tree.num_nodes, np.int64)
    np.add.at(outputs, tree.request_node, output_lens)
    # Depth-first, the nodes of a subtree are a range, and so are the requests.
    first_request = np.cumsum(tree.end_count) - tree.end_count
    end = np.searchsorted(first_request, first_request + tree.num_requests)[1:]
    sums = []
    for values in (outputs, tree.edge_len):
        until = np.cumsum(values)
        sums.append(until[end - 1] - until[:-1])
    ratio = np.zeros(tree.num_nodes, np.float64)
    np.divide(*sums, out=ratio[1:])
    return ratio


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
