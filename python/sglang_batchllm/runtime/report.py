"""The batch report: what was shared, what was computed, and what was held for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_batchllm.planning import BatchPlan
from sglang_batchllm.planning.report import quantiles
from sglang_batchllm.runtime.outputs import finish_type

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclass
class BatchReport:
    """Counts over one batch, or over the batches gathered until the engine was idle again.

    kind: "batch" for a list given in one call, "gathered" for requests that came one by one.
    prompt_tokens: tokens of all prompts. distinct_tokens: of these, the tokens that must be
    computed when none is computed twice, by the plan; with gathered requests summed over their
    plans, so what one leaves in the cache for the next counts again. computed_tokens: those that
    were, over the requests that ran. peak_pinned_tokens: KV tokens held by pins. peak_kv_tokens:
    KV tokens in use that nothing could evict, other requests' included. retractions:
    times that a running request gave its KV back for lack of memory. relaxed_tokens: pinned
    tokens that were given up so that a request could run at all.
    """

    kind: str
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    distinct_tokens: int = 0
    computed_tokens: int = 0
    peak_pinned_tokens: int = 0
    peak_kv_tokens: int = 0
    retractions: int = 0
    relaxed_tokens: int = 0
    planning_seconds: float = 0.0
    started: float = field(default_factory=time.time)
    ended: float | None = None
    _ran_prompt_tokens: int = 0
    _group_sizes: list[np.ndarray] = field(default_factory=list)
    _prefix_lens: list[np.ndarray] = field(default_factory=list)

    def add_plan(self, plan: BatchPlan) -> None:
        self.requests += plan.report.requests
        self.prompt_tokens += plan.report.prompt_tokens
        self.distinct_tokens += plan.report.distinct_tokens
        self.planning_seconds += plan.report.planning_seconds
        self._group_sizes.append(plan.groups.size)
        self._prefix_lens.append(plan.groups.prefix_len)

    def note_pinned(self, tokens: int) -> None:
        self.peak_pinned_tokens = max(self.peak_pinned_tokens, tokens)

    def add_finished(self, req: Req) -> None:
        if finish_type(req) == "abort":
            self.aborted += 1
        else:
            self.finished += 1
        # `already_computed` counts from the prompt's start, cached tokens included; a retraction
        # resets it, but only after the whole prompt had run.
        ran = len(req.origin_input_ids)
        if not req.output_ids:
            ran = min(req.already_computed, ran)
        self._ran_prompt_tokens += ran
        self.computed_tokens += max(ran - req.cached_tokens, 0)

    def to_dict(self) -> dict[str, Any]:
        """The report for `json.dumps`."""
        sizes = np.concatenate(self._group_sizes) if self._group_sizes else np.zeros(0)
        prefixes = np.concatenate(self._prefix_lens) if self._prefix_lens else np.zeros(0)
        saved = self._ran_prompt_tokens - self.computed_tokens
        public = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return public | {
            "seconds": (self.ended or time.time()) - self.started,
            "groups": len(sizes),
            "sharing_degree": float(sizes.mean()) if len(sizes) else 1.0,
            "tokens_saved": saved,
            "saving_ratio": (
                self._ran_prompt_tokens / self.computed_tokens if self.computed_tokens else 1.0
            ),
            "group_size_quantiles": quantiles(sizes),
            "prefix_len_quantiles": quantiles(prefixes),
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        text = (
            f"{self.kind}: {self.requests:,} requests ({self.aborted:,} aborted) in "
            f"{facts['seconds']:.2f} s, {facts['groups']:,} prefix groups of "
            f"{facts['sharing_degree']:.2f} on average; prompt tokens: {self.prompt_tokens:,} "
            f"in all, {self.distinct_tokens:,} distinct, {self.computed_tokens:,} computed, "
            f"{facts['tokens_saved']:,} saved ({facts['saving_ratio']:.2f}x); at most "
            f"{self.peak_pinned_tokens:,} pinned; planned in {self.planning_seconds:.3f} s"
        )
        if self.retractions or self.relaxed_tokens:
            text += f"; {self.retractions:,} retractions"
            text += f", {self.relaxed_tokens:,} pinned tokens given up"
        return text
