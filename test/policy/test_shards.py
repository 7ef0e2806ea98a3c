"""One report of several replicas."""

from typing import Any

from sglang_batchllm.client.get_report import report_in
from sglang_batchllm.policy.report import BatchReport, Report
from sglang_batchllm.policy.shards import Shard


def of_list(shard: Shard | None, ended: float | None = 12.0, **counts: Any) -> dict[str, Any]:
    return BatchReport(shard=shard, started=10.0, ended=ended, **counts).to_dict()


def state(*lists: dict[str, Any], **total: Any) -> dict[str, Any]:
    report = {
        "total": Report(**total).facts(2.0) | {"distinct_tokens": 7},
        "batches": [one for one in lists if one["ended"] is not None],
        "running": [one for one in lists if one["ended"] is None],
        "logprob_bytes": {"now": 1, "peak": 2},
        "kv_tokens": {"total": 100, "free": 90},
        "rank_messages": 3,
    }
    return {"batchllm_report": report}


def test_shards_of_a_list_are_one_list():
    first = of_list(
        Shard("a", 1, 30), requests=3, finished=3, computed_tokens=50, distinct_tokens=50
    )
    second = of_list(
        Shard("a", 0, 30), 15.0, requests=2, finished=2, computed_tokens=40, distinct_tokens=40
    )
    report = report_in([state(first, requests=4), state(second, requests=5)])
    (one,) = report["batches"]
    assert (one["requests"], one["finished"], one["computed_tokens"]) == (5, 5, 90)
    assert (one["distinct_tokens"], one["repeated_tokens"]) == (60, 30)
    assert (one["started"], one["ended"], one["seconds"]) == (10, 15, 5)
    assert one["requests_per_second"] == 1
    assert [part["replica"] for part in one["replicas"]] == [0, 1]
    assert [part["requests"] for part in one["replicas"]] == [2, 3]
    assert report["total"]["requests"] == 9
    assert report["total"]["distinct_tokens"] == 14
    assert report["kv_tokens"] == {"total": 200, "free": 180}
    assert report["logprob_bytes"] == {"now": 2, "peak": 4}
    assert report["replicas"] == 2
    assert report["rank_messages"] == 6


def test_a_list_runs_until_its_last_piece_has_ended():
    pieces = [
        of_list(Shard("a", 0, 0), 12.0, requests=2, peak_kv_tokens=5),
        of_list(Shard("a", 0, 0), None, requests=1, peak_kv_tokens=9),
    ]
    other = of_list(Shard("b", 1, 0), 11.0, requests=7)
    report = report_in([state(*pieces), state(other)])
    assert [one["requests"] for one in report["batches"]] == [7]
    (one,) = report["running"]
    assert one["requests"] == 3
    assert one["peak_kv_tokens"] == 9
    assert [part["requests"] for part in one["replicas"]] == [3]
    assert "shard" not in one["replicas"][0]


def test_one_engine_reports_as_ever():
    alone = state(of_list(None, requests=2))
    assert report_in([alone]) is alone["batchllm_report"]
    assert "shard" not in alone["batchllm_report"]["batches"][0]
