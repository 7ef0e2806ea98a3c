"""What was shared, what was computed, what was held for it, and how fast it went."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from sglang_batchllm.planning import BatchPlan
from sglang_batchllm.policy.requests import End, Request
from sglang_batchllm.policy.shards import Shard


@dataclass
class Report:
    """Counts over the requests of one list, or over all requests since the engine started.

    requests: that have arrived; finished, aborted: of these. prompt_tokens: of all their prompts.
    computed_tokens: prompt tokens that were computed. output_tokens: decoded. groups: prefix groups
    that were planned, grouped_requests: their members. planning_seconds: spent on plans.
    peak_pinned_tokens: KV tokens held by pins at most. retractions: times that a running request
    gave its KV back for lack of memory. relaxed_tokens: pinned tokens that were given up so that a
    request could run at all.
    """

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    groups: int = 0
    grouped_requests: int = 0
    peak_pinned_tokens: int = 0
    retractions: int = 0
    relaxed_tokens: int = 0
    rescored_tokens: int = 0
    planning_seconds: float = 0.0
    _ran_prompt_tokens: int = 0

    def add_plan(self, plan: BatchPlan) -> None:
        self.groups += plan.report.groups
        self.grouped_requests += int(plan.groups.size.sum())
        self.planning_seconds += plan.report.planning_seconds

    def drop_plan(self, plan: BatchPlan) -> None:
        """Another takes its place."""
        self.groups -= plan.report.groups
        self.grouped_requests -= int(plan.groups.size.sum())

    def add_arrived(self, requests: int, prompt_tokens: int) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens

    def note_pinned(self, tokens: int) -> None:
        self.peak_pinned_tokens = max(self.peak_pinned_tokens, tokens)

    def add_ended(self, request: Request, end: End, ran: int) -> None:
        """ran: see `prompt_tokens_run`."""
        if end == "abort":
            self.aborted += 1
        else:
            self.finished += 1
        if ran:
            self._ran_prompt_tokens += ran
            self.computed_tokens += max(ran - max(request.cached_tokens, 0), 0)
        self.output_tokens += len(request.output_ids)

    def facts(self, seconds: float) -> dict[str, Any]:
        """For `json.dumps`. seconds: that these requests took."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return public | {
            "seconds": seconds,
            "sharing_degree": self.grouped_requests / self.groups if self.groups else 1.0,
            "tokens_saved": self._ran_prompt_tokens - self.computed_tokens,
            "saving_ratio": (
                self._ran_prompt_tokens / self.computed_tokens if self.computed_tokens else 1.0
            ),
            "requests_per_second": self.finished / seconds if seconds else 0.0,
            "output_tokens_per_second": self.output_tokens / seconds if seconds else 0.0,
        }


@dataclass
class BatchReport(Report):
    """The report of one list.

    distinct_tokens: prompt tokens that must be computed when none is computed twice, by the plan;
    what an earlier list left in the cache makes `computed_tokens` less. peak_kv_tokens: most KV in
    use that nothing could evict, other requests' included. started, ended: seconds since 1970.
    shard: these are, where the list goes to several replicas.
    """

    distinct_tokens: int = 0
    peak_kv_tokens: int = 0
    group_size_quantiles: dict[str, float] = field(default_factory=dict)
    prefix_len_quantiles: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    ended: float | None = None
    shard: Shard | None = None

    def add_plan(self, plan: BatchPlan) -> None:
        super().add_plan(plan)
        self.add_arrived(plan.report.requests, plan.report.prompt_tokens)
        self.distinct_tokens = plan.report.distinct_tokens
        self.group_size_quantiles = plan.report.group_size_quantiles
        self.prefix_len_quantiles = plan.report.prefix_len_quantiles

    def drop_plan(self, plan: BatchPlan) -> None:
        super().drop_plan(plan)
        self.add_arrived(-plan.report.requests, -plan.report.prompt_tokens)

    def to_dict(self) -> dict[str, Any]:
        facts = self.facts((self.ended or time.time()) - self.started)
        shard = facts.pop("shard")
        return facts if shard is None else facts | {"shard": shard._asdict()}

    def __str__(self) -> str:
        facts = self.to_dict()
        text = (
            f"batch: {self.requests:,} requests ({self.aborted:,} aborted) in "
            f"{facts['seconds']:.2f} s, {self.groups:,} prefix groups of "
            f"{facts['sharing_degree']:.2f} on average; prompt tokens: {self.prompt_tokens:,} "
            f"in all, {self.distinct_tokens:,} distinct, {self.computed_tokens:,} computed, "
            f"{facts['tokens_saved']:,} saved ({facts['saving_ratio']:.2f}x); "
            f"{self.output_tokens:,} tokens decoded; at most {self.peak_pinned_tokens:,} pinned; "
            f"planned in {self.planning_seconds:.3f} s"
        )
        if self.retractions or self.relaxed_tokens:
            text += f"; {self.retractions:,} retractions"
            text += f", {self.relaxed_tokens:,} pinned tokens given up"
        return text


class BusyClock:
    """Seconds in which there was anything to do."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def set(self, busy: bool) -> None:
        if busy and self._since is None:
            self._since = time.monotonic()
        elif not busy and self._since is not None:
            self._seconds, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._seconds + running


class Peaks:
    """The largest value since any moment, by a stack of the values that none has exceeded since."""

    def __init__(self) -> None:
        self._moments: list[int] = []
        self._values: list[int] = []
        self.now = 0

    def note(self, value: int) -> None:
        self.now += 1
        while self._values and self._values[-1] <= value:
            self._values.pop()
            self._moments.pop()
        self._values.append(value)
        self._moments.append(self.now)

    def since(self, moment: int) -> int:
        """Of what was noted after `moment`, as `now` was then; 0 if nothing was."""
        after = bisect_right(self._moments, moment)
        return self._values[after] if after < len(self._values) else 0


def prompt_tokens_run(request: Request) -> int:
    """Prompt tokens that have or had KV, cached ones included. `already_computed` says it until the
    whole prompt has run; a retraction resets it, but only after that."""
    prompt = len(request.origin_input_ids)
    return prompt if request.output_ids else min(request.already_computed, prompt)
