"""Lists that are spread over several schedulers, and the one report of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SUMS = [
    "requests",
    "finished",
    "aborted",
    "prompt_tokens",
    "computed_tokens",
    "output_tokens",
    "groups",
    "grouped_requests",
    "peak_pinned_tokens",
    "retractions",
    "relaxed_tokens",
    "rescored_tokens",
    "distinct_tokens",
    "tokens_saved",
]

Facts = dict[str, Any]


class Shard(NamedTuple):
    """Of a list. name: no other list's. replica: that runs the shard. repeated_tokens: prompt
    tokens that all shards together have more than the list, since several share them."""

    name: str
    replica: int
    repeated_tokens: int


def merged(reports: Sequence[Facts]) -> Facts:
    """The reports of replicas as one. Counts are sums; what a list's replicas did by themselves is
    in its ``replicas``. `distinct_tokens` of a list are the whole list's; those of the total are
    what each replica's requests have distinct, added up."""
    shards: dict[object, list[Facts]] = {}
    for report in reports:
        for facts in [*report["batches"], *report["running"]]:
            shard = facts.get("shard")
            shards.setdefault(shard["name"] if shard else id(facts), []).append(facts)
    lists = [_list(parts) for parts in shards.values()]
    ended = [one for one in lists if one["ended"] is not None]
    return {
        "total": _sum(
            [report["total"] for report in reports],
            max(report["total"]["seconds"] for report in reports),
        ),
        "batches": sorted(ended, key=lambda one: one["ended"]),
        "running": [one for one in lists if one["ended"] is None],
        "logprob_bytes": _added([report["logprob_bytes"] for report in reports]),
        "kv_tokens": _added([report["kv_tokens"] for report in reports]),
        "rank_messages": sum(report["rank_messages"] for report in reports),
        "replicas": len(reports),
    }


def _list(parts: Sequence[Facts]) -> Facts:
    """What replicas have of one list together: it runs as long as any of it does."""
    by_replica: dict[int, list[Facts]] = {}
    for part in parts:
        by_replica.setdefault(part.get("shard", {}).get("replica", 0), []).append(part)
    repeated = parts[0].get("shard", {}).get("repeated_tokens", 0)
    facts = _together(parts)
    facts["distinct_tokens"] -= repeated
    facts["peak_kv_tokens"] = sum(
        max(part["peak_kv_tokens"] for part in own) for own in by_replica.values()
    )
    return facts | {
        "repeated_tokens": repeated,
        "replicas": [
            {"replica": replica, **_together(by_replica[replica])} for replica in sorted(by_replica)
        ],
    }


def _together(parts: Sequence[Facts]) -> Facts:
    """Of one replica, what it got of a list in one piece with all that is known of it."""
    if len(parts) == 1:
        return {name: value for name, value in parts[0].items() if name != "shard"}
    started = min(part["started"] for part in parts)
    ends = [part["ended"] for part in parts]
    return _sum(parts, max(part["started"] + part["seconds"] for part in parts) - started) | {
        "peak_kv_tokens": max(part["peak_kv_tokens"] for part in parts),
        "started": started,
        "ended": None if None in ends else max(ends),
    }


def _sum(parts: Sequence[Facts], seconds: float) -> Facts:
    """seconds: that all took together."""
    facts: Facts = _added([{name: part[name] for name in SUMS} for part in parts])
    computed, groups = facts["computed_tokens"], facts["groups"]
    return facts | {
        "planning_seconds": max(part["planning_seconds"] for part in parts),
        "seconds": seconds,
        "sharing_degree": facts["grouped_requests"] / groups if groups else 1.0,
        "saving_ratio": (computed + facts["tokens_saved"]) / computed if computed else 1.0,
        "requests_per_second": facts["finished"] / seconds if seconds else 0.0,
        "output_tokens_per_second": facts["output_tokens"] / seconds if seconds else 0.0,
    }


def _added(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
