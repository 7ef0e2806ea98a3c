"""What a forward step costs, fitted by least squares to steps that `bench_offline.py` recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from steps import Step

GRAPH_LAUNCH_MS = 5.0
"""A decode step launched in less was replayed from a CUDA graph; an eager one takes two to three
times as long (some 400 kernels)."""


@dataclass(frozen=True)
class Work:
    """What one forward step has to do; the fields of `steps.Step` that decide its time.

    unique_kv: KV tokens that decoding rows read, a shared prefix once per group. Step logs do not
    have it; `Work.of` takes the slots in use, which is equal where all KV belongs to running
    requests.
    """

    prefill_tokens: int
    attended: int
    decode_requests: int
    context: int
    unique_kv: int
    kv_used: int

    @staticmethod
    def of(step: Step) -> Work:
        return Work(
            step.prefill_tokens,
            step.attended,
            step.decode_requests,
            step.context,
            step.kv_used if step.decode_requests else 0,
            step.kv_used,
        )


@dataclass(frozen=True)
class CostModel:
    """GPU time of a step, host time of a step, and the host time before the first.

    GPU milliseconds: token_ms * max(tokens, least_tokens) + pair_ms * attended + kv_ms *
    unique_kv + context_ms * context, and decode_step_ms or, in a step that prefills,
    prefill_step_ms. Tokens are those prefilled and the decoding rows together: below
    `least_tokens` reading the weights takes longer than using them. A mixed step reads them once.
    eager_host_ms, mixed_host_ms, graph_host_ms: to choose and launch a step. ingest_ms: per prompt
    token, from the call to the first step.
    """

    decode_step_ms: float
    prefill_step_ms: float
    token_ms: float
    least_tokens: int
    pair_ms: float
    kv_ms: float
    context_ms: float
    eager_host_ms: float
    mixed_host_ms: float
    graph_host_ms: float
    ingest_ms: float

    def gpu_ms(self, work: Work) -> float:
        weights = (
            *(self.decode_step_ms, self.prefill_step_ms, self.token_ms),
            *(self.pair_ms, self.kv_ms, self.context_ms),
        )
        return float(np.dot(weights, _features(work, self.least_tokens)))

    def parts(self, works: Sequence[Work]) -> dict[str, float]:
        """GPU seconds by what they go to: prompt tokens outside attention, prefill attention,
        decoding rows outside attention, decode attention. A mixed step's fixed part counts as
        prefill."""
        seconds = {"prefill": 0.0, "attention": 0.0, "decode": 0.0, "kv": 0.0}
        for work in works:
            attention = self.pair_ms * work.attended
            kv = self.kv_ms * work.unique_kv + self.context_ms * work.context
            riding = self.token_ms * work.decode_requests if work.prefill_tokens else 0.0
            rest = self.gpu_ms(work) - attention - kv - riding
            seconds["attention"] += attention / 1000
            seconds["kv"] += kv / 1000
            seconds["decode"] += riding / 1000
            seconds["prefill" if work.prefill_tokens else "decode"] += rest / 1000
        return seconds

    def host_ms(self, work: Work, graph_limit: int | None) -> float:
        host_ms = {
            "eager": self.eager_host_ms,
            "mixed": self.mixed_host_ms,
            "graph": self.graph_host_ms,
        }
        return host_ms[_host_kind(work, graph_limit)]

    def ends(self, works: Sequence[Work], graph_limit: int | None) -> np.ndarray:
        """When each step is done on the GPU, float64[len(works)], seconds after the first launch.

        SGLang launches a step while the one before runs, and the next when that is done. An
        eager step is never done before its host time has passed.
        """
        launch = previous = end = 0.0
        ends = []
        for work in works:
            launched = launch + self.host_ms(work, graph_limit)
            previous, end = end, max(max(end, launch) + self.gpu_ms(work), launched)
            launch = max(launched, previous)
            ends.append(end / 1000)
        return np.array(ends)

    def seconds(self, works: Sequence[Work], graph_limit: int | None, prompt_tokens: int) -> float:
        """From the call to the last result."""
        return float(self.ends(works, graph_limit)[-1]) + self.ingest_ms * prompt_tokens / 1000


def _features(work: Work, least_tokens: int) -> tuple[float, ...]:
    tokens = max(work.prefill_tokens + work.decode_requests, least_tokens)
    prefills = float(work.prefill_tokens > 0)
    return (1.0 - prefills, prefills, tokens, work.attended, work.unique_kv, work.context)


def _host_kind(work: Work, graph_limit: int | None) -> str:
    """How a step is launched: replayed from a CUDA graph, eagerly, or eagerly in two parts."""
    if work.prefill_tokens:
        return "mixed" if work.decode_requests else "eager"
    too_many = graph_limit is not None and work.decode_requests > graph_limit
    return "eager" if too_many else "graph"


def steps_of(run: dict[str, Any]) -> list[Step]:
    """The steps of one entry of a file that `bench_offline.py --steps` wrote."""
    return [Step(*values) for values in run["steps"]]


def graph_limit_of(steps: Sequence[Step]) -> int | None:
    """Most rows that a decode step replayed from a CUDA graph; None if none had more."""
    decodes = [step for step in steps if not step.prefill_tokens]
    most = max((step.decode_requests for step in decodes), default=0)
    replayed = [s.decode_requests for s in decodes if s.launch_ms < GRAPH_LAUNCH_MS]
    limit = max(replayed, default=0)
    return None if limit == most else limit


def fit(runs: Sequence[dict[str, Any]]) -> CostModel:
    """Fit to all steps of `runs`, each step's error weighed by the root of its time.

    A step's GPU time is the interval from the next step's launch to the one after, for launches
    run one step ahead. Left out are a run's first step, intervals that the host decides, and
    those that the fit misses by more than a quarter.
    """
    prepared = [(steps, graph_limit_of(steps)) for steps in map(steps_of, runs)]
    host: dict[str, list[float]] = {}
    for steps, limit in prepared:
        for step in steps:
            kind = _host_kind(Work.of(step), limit)
            host.setdefault(kind, []).append(step.schedule_ms + step.launch_ms)
    host_ms = {kind: float(np.median(times)) for kind, times in host.items()}

    works, times = [], []
    for steps, limit in prepared:
        for step, launched, after in zip(steps[1:], steps[2:], steps[3:], strict=False):
            interval = (after.start - launched.start) * 1000
            if interval > 1.3 * host_ms[_host_kind(Work.of(launched), limit)]:
                works.append(Work.of(step))
                times.append(interval)
    measured = np.array(times)

    solutions = (_solve(works, measured, least) for least in range(16, 513, 16))
    _, least_tokens, solution = min(solutions, key=lambda found: found[0])
    decode_step_ms, prefill_step_ms, token_ms, pair_ms, kv_ms, context_ms = solution.tolist()
    before = [1000 * (run["seconds"] - _span(steps_of(run))) for run in runs]
    return CostModel(
        decode_step_ms=decode_step_ms,
        prefill_step_ms=prefill_step_ms,
        token_ms=token_ms,
        least_tokens=least_tokens,
        pair_ms=pair_ms,
        kv_ms=kv_ms,
        context_ms=context_ms,
        eager_host_ms=host_ms["eager"],
        mixed_host_ms=host_ms.get("mixed", host_ms["eager"]),
        graph_host_ms=host_ms["graph"],
        ingest_ms=sum(before) / sum(run["prompt_tokens"] for run in runs),
    )


def _solve(
    works: Sequence[Work], measured: np.ndarray, least_tokens: int
) -> tuple[float, int, np.ndarray]:
    """The error, `least_tokens`, and the best weights of the features for it."""
    features = np.array([_features(work, least_tokens) for work in works])
    solution, error = _weighted(features, measured)
    for _ in range(2):
        kept = np.abs(features @ solution - measured) < measured / 4
        solution, error = _weighted(features[kept], measured[kept])
    return error, least_tokens, solution


def _weighted(features: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, float]:
    """No feature can make a step faster, so the weights are not negative."""
    scale = 1 / np.sqrt(measured)
    solution, error = nnls(features * scale[:, None], measured * scale)
    return solution, error / np.sqrt(len(measured))


def _span(steps: Sequence[Step]) -> float:
    """Seconds from the first launch to about the end of the last step."""
    return steps[-1].start - steps[0].start + 2 * (steps[-1].start - steps[-2].start)
