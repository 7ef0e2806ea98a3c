"""What a plan is worth, in numbers for a log and a result file."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}


def quantiles(values: np.ndarray) -> dict[str, float]:
    """min, p25, p50, p75, p90 and max of `values`; empty for no values."""
    if not values.size:
        return {}
    found = np.quantile(values, list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, found.tolist(), strict=True))


@dataclass(frozen=True)
class PlanReport:
    """Counts of requests, groups and prompt tokens, as plain Python numbers.

    sharing_degree: mean members of a group, each group counted once; 1.0 without groups.
    prompt_tokens: tokens of all prompts.
    distinct_tokens: of these, the tokens that must be computed when none is computed twice.
    tokens_saved: the difference. saving_ratio: prompt_tokens / distinct_tokens; 1.0 if empty.
    group_size_quantiles: members. prefix_len_quantiles: shared tokens. Both over groups.
    """

    requests: int
    groups: int
    sharing_degree: float
    prompt_tokens: int
    distinct_tokens: int
    tokens_saved: int
    saving_ratio: float
    group_size_quantiles: dict[str, float]
    prefix_len_quantiles: dict[str, float]
    planning_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report for `json.dumps`."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"batch plan: {self.requests:,} requests, {self.groups:,} prefix groups, "
            f"sharing degree {self.sharing_degree:.2f}",
            f"prompt tokens: {self.prompt_tokens:,} in all, {self.distinct_tokens:,} to compute, "
            f"{self.tokens_saved:,} saved ({self.saving_ratio:.2f}x)",
        ]
        if self.groups:
            size, prefix = self.group_size_quantiles, self.prefix_len_quantiles
            lines.append(
                f"members per group: median {size['p50']:,.0f}, {size['min']:,.0f} to "
                f"{size['max']:,.0f}; shared prefix: median {prefix['p50']:,.0f} tokens, "
                f"{prefix['min']:,.0f} to {prefix['max']:,.0f}"
            )
        lines.append(f"planned in {self.planning_seconds:.3f} s")
        return "\n".join(lines)
