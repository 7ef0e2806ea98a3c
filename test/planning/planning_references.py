"""Slow, literal versions of what the planner computes, and prompts to compare the two on."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations

from hypothesis import settings
from hypothesis import strategies as st

from sglang_batchllm.planning import BatchPlan, PrefixTree

Prompt = Sequence[int]

thorough = settings(max_examples=400)
"""For properties of small prompts, which cost little."""


@st.composite
def batches(draw: st.DrawFn, max_prompts: int = 9, max_len: int = 5) -> list[list[int]]:
    """Prompts over two symbols, so that they share a lot, each position stretched to some
    length, so that node depths vary; duplicates and prefixes of others are common."""
    short = draw(
        st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=max_len), max_size=max_prompts)
    )
    stretch = draw(st.lists(st.integers(1, 12), min_size=max_len, max_size=max_len))
    return [
        [token for token, times in zip(prompt, stretch, strict=False) for _ in range(times)]
        for prompt in short
    ]


@dataclass
class Node:
    """A node of the reference tree, which holds its requests by name."""

    depth: int
    members: list[int]
    ends: list[int]
    children: list["Node"] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        yield self
        for child in self.children:
            yield from child.walk()


def reference_tree(
    prompts: Sequence[Prompt], page_size: int, namespaces: Sequence[Hashable] | None = None
) -> Node:
    """Split sets of requests by their next page, recursively."""

    def split(members: list[int], depth: int) -> list[list[int]]:
        parts: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            parts.setdefault(tuple(prompts[i][depth : depth + page_size]), []).append(i)
        return list(parts.values())

    def visit(members: list[int]) -> Node:
        texts = [tuple(prompts[i]) for i in members]
        depth = len(texts[0])
        if len(set(texts)) > 1:
            while any(text[:depth] != texts[0][:depth] for text in texts):
                depth -= 1
            depth -= depth % page_size
        ends = [i for i in members if len(prompts[i]) == depth]
        rest = [i for i in members if len(prompts[i]) > depth]
        return Node(depth, members, ends, [visit(part) for part in split(rest, depth)])

    spaces: dict[Hashable, list[int]] = {}
    for i in range(len(prompts)):
        spaces.setdefault(None if namespaces is None else namespaces[i], []).append(i)
    tops = [visit(part) for space in spaces.values() for part in split(space, 0)]
    return Node(0, list(range(len(prompts))), [], tops)


def reference_order(root: Node, output_lens: Sequence[int]) -> list[int]:
    """Depth-first, ends first, then child subtrees by longest output, decoding ratio and smallest
    request."""

    def distinct(node: Node, above: int) -> int:
        return node.depth - above + sum(distinct(child, node.depth) for child in node.children)

    def rank(child: Node, above: int) -> tuple[int, Fraction, int]:
        outputs = [output_lens[i] for i in child.members]
        ratio = Fraction(sum(outputs), distinct(child, above))
        return -max(outputs), -ratio, min(child.members)

    def visit(node: Node) -> list[int]:
        order = sorted(node.ends)
        for child in sorted(node.children, key=lambda child: rank(child, node.depth)):
            order += visit(child)
        return order

    return visit(root)


def simulate_cache(
    prompts: Sequence[Prompt], order: Sequence[int], page_size: int
) -> dict[int, int]:
    """Tokens each request computes when whole pages of everything earlier are cached and the
    last prompt token is never taken from the cache."""
    pages: dict[tuple[int, ...], bool] = {}
    computed = {}
    for i in order:
        prompt = tuple(prompts[i])
        cached = 0
        while cached + page_size < len(prompt) and prompt[: cached + page_size] in pages:
            cached += page_size
        computed[i] = len(prompt) - cached
        for end in range(page_size, len(prompt) + 1, page_size):
            pages[prompt[:end]] = True
    return computed


def group_savings(plan: BatchPlan) -> int:
    """Prefix reads that the plan's groups save."""
    return int(((plan.groups.size - 1) * plan.groups.prefix_len).sum())


def best_savings(prompts: Sequence[Prompt], page_size: int) -> tuple[int, int] | None:
    """Most prefix reads that any set of shared prefixes saves, and the size of the smallest such
    set, tried one by one straight from the prompts; None when there are too many sets.

    A prefix of whole pages can be shared when some prompt continues after it.
    """
    by_members: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        for length in range(page_size, len(prompt), page_size):
            members = tuple(
                i for i, other in enumerate(prompts) if other[:length] == prompt[:length]
            )
            if len(members) > 1:  # of the prefixes of the same requests only the longest matters
                by_members[members] = max(length, by_members.get(members, 0))
    candidates = sorted(by_members.items(), key=lambda item: item[1])
    if len(candidates) > 9:
        return None
    best, groups = 0, 0
    for size in range(len(candidates) + 1):
        for chosen in combinations(candidates, size):
            owner = {i: length for members, length in chosen for i in members}
            saved = sum(owner.values()) - sum(length for _, length in chosen)
            if saved > best:
                best, groups = saved, size
    return best, groups


def literal_dp(tree: PrefixTree, usable: Sequence[int]) -> tuple[int, int]:
    """The recurrence F(v, a) as it is written, for every node and every ancestor's depth: the
    most savings and the fewest groups that give them."""
    children: list[list[int]] = [[] for _ in range(tree.num_nodes)]
    for node in range(1, tree.num_nodes):
        children[tree.parent[node]].append(node)
    best: list[dict[int, tuple[int, int]]] = [{} for _ in range(tree.num_nodes)]
    for node in reversed(range(tree.num_nodes)):
        ends, own = int(tree.end_count[node]), usable[node]
        above, depths = int(tree.parent[node]), {0}
        while above > 0:
            depths.add(usable[above])
            above = int(tree.parent[above])
        for a in depths:
            options = [(ends * a, 0, a)] + ([((ends - 1) * own, -1, own)] if node else [])
            best[node][a] = max(
                (
                    saved + sum(best[child][at][0] for child in children[node]),
                    fewer + sum(best[child][at][1] for child in children[node]),
                )
                for saved, fewer, at in options
            )
    saved, fewer = best[0][0]
    return saved, -fewer


def greedy_savings(tree: PrefixTree, usable: Sequence[int]) -> int:
    """Savings of a local rule in the manner of BatchLLM (arXiv 2412.03594).

    Bottom-up, a node starts as one group of all requests still in its subtree, and a child's
    remaining m requests are split off into a group of their own when that alone saves more:
    (m - 1) * d(child) > m * d(node). What a split leaves behind for its siblings, and whether
    the node's own group survives further up, is not looked at.
    """
    remaining = tree.end_count.tolist()
    saved = 0
    for child in range(tree.num_nodes - 1, 0, -1):
        node, m = tree.parent[child], remaining[child]
        if m > 1 and (m - 1) * usable[child] > m * usable[node]:
            saved += (m - 1) * usable[child]
        else:
            remaining[node] += m
    return saved
