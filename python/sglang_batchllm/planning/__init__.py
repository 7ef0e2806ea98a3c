"""Planning: from the prompts of a whole batch to prefix groups and an execution order.

numpy only; nothing here knows about an engine. `plan_batch` is the entry point; `partition` spreads
a planned batch over several engines.
"""

from sglang_batchllm.planning.pages import floor_to_page
from sglang_batchllm.planning.partition import Costs, Partition, evaluate, partition
from sglang_batchllm.planning.pieces import pieces_of
from sglang_batchllm.planning.plan import BatchPlan, PrefixGroups, plan_batch
from sglang_batchllm.planning.prefix_tree import PrefixTree
from sglang_batchllm.planning.summary import PlanReport
from sglang_batchllm.planning.tokens import Prompts, TokenTable

__all__ = [
    "BatchPlan",
    "Costs",
    "Partition",
    "PlanReport",
    "PrefixGroups",
    "PrefixTree",
    "Prompts",
    "TokenTable",
    "evaluate",
    "floor_to_page",
    "partition",
    "pieces_of",
    "plan_batch",
]
