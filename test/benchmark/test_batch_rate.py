"""Figures of batch files: of whole answers only, and set against the best of the other sides."""

import pytest

from batches import Case
from bench_batch_rate import figures, print_table
from servers import Usage, usage_of

CASE = Case("small", 2, 2, 50, 10, 5)


def test_figures_of_answers():
    row = figures(CASE, [Usage(60, 0, 5), Usage(61, 50, 5)], seconds=4.0)
    assert row == {"requests_per_second": 0.5, "prompt_tokens": 121, "computed_tokens": 71}


@pytest.mark.parametrize("usages", [[Usage(60, 0, 5)], [Usage(60, 0, 5), Usage(60, 50, 4)]])
def test_answers_that_lack_something_are_refused(usages):
    with pytest.raises(ValueError, match="answers"):
        figures(CASE, usages, seconds=4.0)


def test_usage_of_an_answer_with_nothing_cached():
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": None}
    assert usage_of({"usage": usage}) == Usage(9, 0, 2)
    usage["prompt_tokens_details"] = {"cached_tokens": 8}
    assert usage_of({"usage": usage}) == Usage(9, 8, 2)


def test_the_table_has_ratios_to_the_better_run(capsys):
    rows = [
        {"case": "M1", "side": side, "requests_per_second": rate}
        for side, rate in [("texts", 40.0), ("texts", 50.0), ("stock chat", 10.0)]
    ]
    rows.append(
        {
            "case": "M1",
            "side": "batch file",
            "requests_per_second": 20.0,
            "running_requests_per_second": 40.0,
        }
    )
    print_table(rows)
    _, whole, running = capsys.readouterr().out.splitlines()
    assert whole.split()[3:] == ["20.0", "50.0", "10.0", "0.400", "2.000"]
    assert running.split()[-2:] == ["0.800", "4.000"]


def test_the_table_has_gaps_where_sides_were_left_out(capsys):
    print_table([{"case": "M5", "side": "texts", "requests_per_second": 40.0}])
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "40.0"
