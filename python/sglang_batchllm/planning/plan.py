"""`plan_batch`: everything the engine needs to know about a batch before it runs."""

import operator
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_batchllm.planning.grouping import choose_groups, usable_depth
from sglang_batchllm.planning.order import execution_starts, longest_earlier_prefix, order_of
from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.prefix_tree import PrefixTree, build_prefix_tree
from sglang_batchllm.planning.sorting import sort_prompts
from sglang_batchllm.planning.summary import PlanReport, quantiles
from sglang_batchllm.planning.tokens import Prompts, as_table

BYTES_PER_REQUEST = 600
"""Most memory that planning takes for a request, of which at most 90 bytes are the plan's."""

BYTES_AT_ONCE = 256 << 20
"""Most memory that planning takes beside that of requests; see `sorting.ROUND_TOKENS`."""


@dataclass(frozen=True, eq=False)
class PrefixGroups:
    """The chosen prefix groups, in order of first appearance in the order of execution.

    node: int32[G], the group's node in the prefix tree.
    prefix_len: int64[G], shared tokens in whole pages, see `grouping.usable_depth`. A member
        whose prompt ends at the group's node computes its own last token, so it can find fewer
        than prefix_len tokens in the cache; its `shared_len` says how many.
    size: int32[G], members, at least two.
    """

    node: np.ndarray
    prefix_len: np.ndarray
    size: np.ndarray


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The plan of a batch of n requests; requests are named by their index in the batch.

    order: int64[n], request indices in order of execution, see `order.execution_starts`.
    group_of: int32[n], index into `groups`, or -1.
    shared_len: int64[n], tokens of the longest prefix a request shares with any other, in whole
        pages and without the request's last token, which is always computed.
    to_compute: int64[n], prompt tokens a request computes when the batch is executed in `order`
        and everything earlier is cached. The sum is the least possible in any order.
    prompt_lens: int64[n], tokens.
    """

    tree: PrefixTree
    order: np.ndarray
    groups: PrefixGroups
    group_of: np.ndarray
    shared_len: np.ndarray
    to_compute: np.ndarray
    page_size: int
    prompt_lens: np.ndarray
    report: PlanReport


def plan_batch(
    prompts: Prompts,
    page_size: int = 1,
    expected_output_lens: Sequence[int] | np.ndarray | None = None,
    *,
    namespaces: Sequence[Hashable] | None = None,
) -> BatchPlan:
    """Find the prefix groups of a batch and the order to execute it in.

    prompts: n prompts of token ids (any integers that fit in int64), each at least one token:
        a sequence of integer sequences or arrays, a 2-D array, or a `TokenTable`.
    page_size: tokens per KV page; only whole pages are shared.
    expected_output_lens: n token counts that order the batch; None takes all as equal.
    namespaces: n values (a LoRA adapter, a cache salt); prompts whose values differ share
        nothing. None puts all in one.

    The idea of batch-global prefix groups is BatchLLM's (arXiv 2412.03594); the choice of groups
    is an exact dynamic program, see `grouping`. Time is that of sorting the prompts plus linear
    in tokens. The same input gives the same plan.

    Memory is at most `BYTES_PER_REQUEST` for each request and `BYTES_AT_ONCE`, whatever the number
    of tokens, if these are a table or a 2-D array: a `TokenTable` of a `np.memmap` may be larger
    than memory. Other forms are copied first, 4 bytes a token. Namespaces need memory of their own.

    Raises ValueError, naming the prompt where one is to blame.
    """
    started = time.perf_counter()
    page_size = operator.index(page_size)
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; pass the tokens per KV page, 1 or more")
    table = as_table(prompts)
    lens = np.diff(table.offsets)
    output_lens = check_output_lens(expected_output_lens, len(lens))
    if namespaces is not None and len(namespaces) != len(lens):
        raise ValueError(
            f"namespaces has {len(namespaces)} entries for {len(lens)} prompts; pass one each"
        )

    in_order = sort_prompts(table, _ranks(namespaces, len(lens)))
    del table  # may be a copy of the tokens
    tree = build_prefix_tree(in_order, lens, page_size)
    del in_order
    starts = execution_starts(tree, output_lens)
    order = order_of(tree, starts)
    groups, group_of = _number_groups(tree, order, page_size)

    longest_cached = floor_to_page(lens - 1, page_size)
    node = tree.request_node
    shared_at = np.where(tree.num_requests[node] > 1, node, tree.parent[node])
    shared_len = np.minimum(floor_to_page(tree.depth[shared_at], page_size), longest_cached)
    earlier = longest_earlier_prefix(tree, starts, order, page_size)
    to_compute = lens - np.minimum(earlier, longest_cached)

    prompt_tokens, distinct_tokens = int(lens.sum()), int(to_compute.sum())
    report = PlanReport(
        requests=len(lens),
        groups=len(groups.size),
        sharing_degree=float(groups.size.mean()) if groups.size.size else 1.0,
        prompt_tokens=prompt_tokens,
        distinct_tokens=distinct_tokens,
        tokens_saved=prompt_tokens - distinct_tokens,
        saving_ratio=prompt_tokens / distinct_tokens if distinct_tokens else 1.0,
        group_size_quantiles=quantiles(groups.size),
        prefix_len_quantiles=quantiles(groups.prefix_len),
        planning_seconds=time.perf_counter() - started,
    )
    return BatchPlan(tree, order, groups, group_of, shared_len, to_compute, page_size, lens, report)


def check_output_lens(expected: Sequence[int] | np.ndarray | None, count: int) -> np.ndarray:
    if expected is None:
        return np.ones(count, np.int64)
    lens = np.asarray(expected)
    if lens.shape != (count,):
        raise ValueError(
            f"expected_output_lens has shape {lens.shape} for {count} prompts; pass one per prompt"
        )
    if count and lens.dtype.kind not in "iu":
        raise ValueError(
            f"expected_output_lens has dtype {lens.dtype}; pass whole numbers of tokens"
        )
    negative = np.flatnonzero(lens < 0)
    if negative.size:
        raise ValueError(
            f"prompt {negative[0]} has expected output length {lens[negative[0]]}; pass 0 or more"
        )
    return lens.astype(np.int64)


def _ranks(namespaces: Sequence[Hashable] | None, count: int) -> np.ndarray:
    """int32[count], the same number for the same namespace."""
    if namespaces is None:
        return np.zeros(count, np.int32)
    ranks: dict[Hashable, int] = {}
    return np.fromiter((ranks.setdefault(space, len(ranks)) for space in namespaces), np.int32)


def _number_groups(
    tree: PrefixTree, order: np.ndarray, page_size: int
) -> tuple[PrefixGroups, np.ndarray]:
    """The chosen groups by first appearance in `order`, and each request's among them."""
    node_of = choose_groups(tree, page_size)[tree.request_node]
    in_order = node_of[order]
    nodes, first_at = np.unique(in_order[in_order > 0], return_index=True)
    nodes = nodes[np.argsort(first_at)]
    index_of = np.full(tree.num_nodes, -1, np.int32)
    index_of[nodes] = np.arange(len(nodes))
    group_of = index_of[node_of]
    groups = PrefixGroups(
        node=nodes,
        prefix_len=usable_depth(tree, page_size)[nodes],
        size=np.bincount(group_of[group_of >= 0], minlength=len(nodes)).astype(np.int32),
    )
    return groups, group_of
