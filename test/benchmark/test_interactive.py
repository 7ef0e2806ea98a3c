"""Times to the first token: what has not come counts as long as it was waited for."""

import pytest

from bench_interactive import Stream, figures


def test_quantiles_of_streams_that_all_came():
    streams = [Stream(sent=float(at), first=0.1 * at, last=1.0 + at) for at in range(1, 11)]
    row = figures(streams, ended=100.0)
    assert (row["interactive_requests"], row["unanswered"], row["failed"]) == (10, 0, 0)
    assert row["first_token_p50_seconds"] == pytest.approx(0.55)
    assert row["first_token_p90_seconds"] == pytest.approx(0.91)
    assert row["first_token_worst_seconds"] == pytest.approx(1.0)
    assert row["last_token_p50_seconds"] == pytest.approx(6.5)


def test_what_has_not_come_was_waited_for_that_long():
    streams = [
        Stream(sent=0.0, first=0.5, last=1.0),
        Stream(sent=1.0, first=2.0),  # begun
        Stream(sent=2.0),
        Stream(sent=3.0, error="the stream broke off"),
    ]
    row = figures(streams, ended=10.0)
    assert row["first_token_seconds"] == [0.5, 2.0, 8.0, 7.0]
    assert (row["unanswered"], row["failed"]) == (2, 1)
    assert row["first_error"] == "the stream broke off"
    assert row["last_token_p50_seconds"] == 1.0


def test_nothing_has_come():
    row = figures([Stream(sent=4.0)], ended=6.0)
    assert (row["unanswered"], row["last_token_p50_seconds"]) == (1, None)
