"""The choice of prefix groups: which requests read which shared prefix together.

Prefix groups that are known for the whole batch are the idea of BatchLLM (arXiv 2412.03594),
which finds them by a local rule. The dynamic program here finds an optimal choice.
"""

import numpy as np

from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.prefix_tree import PrefixTree


def usable_depth(tree: PrefixTree, page_size: int) -> np.ndarray:
    """Tokens that a group at each node shares, int64[num_nodes].

    The node's depth in whole pages. Where nothing continues below a node, all who share it end
    exactly there and each must still compute its last token, so the depth without that token,
    in whole pages. (Where something does continue, the whole prefix is in the cache for its
    sake; a request that ends at the node computes its last token and then finds it there.)
    Never less than the usable depth of the parent.
    """
    ends_below = tree.num_requests == tree.end_count
    return floor_to_page(tree.depth - (ends_below & (tree.depth > 0)), page_size)


def choose_groups(tree: PrefixTree, page_size: int) -> np.ndarray:
    """The node of the group to which a request ending at each node belongs, int32[num_nodes].

    0, the root, stands for no group. A request belongs to its deepest chosen ancestor-or-self;
    with m(g) the requests that belong to g and d(g) its usable depth, the choice maximises the
    saved prefix reads, the sum of (m(g) - 1) * d(g), and among the best choices takes one with
    the fewest groups. So every group has two members or more: one with fewer saves nothing, and
    leaving it out saves no less.
    """
    inner, above, leaves = tree.inner()
    up, depth = above.tolist(), usable_depth(tree, page_size)[inner].tolist()
    alone = np.bincount(tree.parent[leaves], minlength=tree.num_nodes)
    ends = (tree.end_count + alone)[inner].tolist()
    chosen_below = _choice_thresholds(up, depth, ends, unit=tree.num_nodes)
    group = [0] * len(up)
    for node in range(1, len(up)):
        over = group[up[node]]
        group[node] = node if depth[over] < chosen_below[node] else over
    group_node = np.zeros(tree.num_nodes, np.int32)
    group_node[inner] = inner[group]
    group_node[leaves] = group_node[tree.parent[leaves]]
    return group_node


def _choice_thresholds(up: list[int], depth: list[int], ends: list[int], unit: int) -> list[int]:
    """For each inner node, the depth such that choosing it pays exactly when its nearest chosen
    ancestor is less deep than that; 0 for never.

    up: each node's parent. depth: its usable depth. ends: the requests that end at the node or at
    a leaf of their own below it.

    With a the depth of the nearest chosen ancestor and e(v) the requests ending at v,

        F(v, a) = max(G(v, a), G(v, d(v)) - d(v)),   G(v, a) = e(v) * a + sum of F(c, a)

    over the children c: leave v out, or choose it. G rises with a and is convex and
    piecewise linear, and the other side is a constant, so choosing v pays below one threshold
    and F is again of that kind: flat up to the threshold, G after it. A request alone at its
    leaf gives F = a.

    F(v, .) is kept on the integers 0..d(parent) as its value and slope at 0 and its bends,
    {position: rise in slope}. Since F(v, 0) >= G(v, d(v)) - d(v), F rises by no more than d(v)
    on 0..d(v), and its slopes are distinct integers, so it has O(sqrt(d(v))) bends. That bounds
    the work at every node whatever the tree's shape; in practice few bends reach a parent, and
    time is near linear in nodes.

    A saved token counts `unit` and a group costs 1, less than one token for all groups together:
    that settles equals in favour of fewer groups.
    """
    chosen_below = [0] * len(up)
    # Of G(v, .), summed up as the children of v are done.
    at_zero = [0] * len(up)
    slope_at_zero = [unit * count for count in ends]
    bends_of: dict[int, dict[int, int]] = {}

    for node in range(len(up) - 1, 0, -1):
        value, slope = at_zero[node], slope_at_zero[node]
        bends = sorted(bends_of.pop(node, {}).items())
        here = depth[node]
        at_depth = value + slope * here + sum(rise * (here - at) for at, rise in bends)
        if_chosen = at_depth - unit * here - 1
        if value < if_chosen:
            # Walk G up to the piece in which it reaches `if_chosen`.
            start, passed = 0, 0
            for at, rise in bends:
                ahead = value + slope * (at - start)
                if ahead >= if_chosen:
                    break
                value, slope, start, passed = ahead, slope + rise, at, passed + 1
            below = start + -(-(if_chosen - value) // slope)
            first_step = value + slope * (below - start) - if_chosen
            chosen_below[node] = below
            # Flat up to below - 1, one step to G(below), then as G was. The two new bends keep
            # F exact on the integers although the lines cross between them.
            bends = [(below - 1, first_step), (below, slope - first_step), *bends[passed:]]
            value, slope = if_chosen, 0
        over = up[node]
        at_zero[over] += value
        slope_at_zero[over] += slope
        for at, rise in bends:
            if at < depth[over] and rise:
                to = bends_of.setdefault(over, {})
                to[at] = to.get(at, 0) + rise
    return chosen_below
