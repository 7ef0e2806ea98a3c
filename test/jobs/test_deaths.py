"""Servers that die under a job, and such as say nothing about the request."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from pretended_server import (
    KINDS,
    Script,
    answers_in,
    cancelled,
    expected_answers,
    files_of,
    prompt_number,
    records_in,
    run,
)
from sglang_batchllm.jobs import dispatch
from sglang_batchllm.jobs.errors import JobError


@KINDS
@pytest.mark.parametrize("at", [0, 20, 39])
def test_a_request_that_kills_is_recorded_and_the_others_are_answered(
    tmp_path: Path, ours: int | None, at: int
):
    files = files_of(tmp_path, 40)
    killers = frozenset([prompt_number(at)])
    script = Script(ours=ours, killers=killers)
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(40) | {f"r{at}": None}
    (error,) = [record["error"] for record in records_in(files.output) if record["error"]]
    assert (error["code"], error["line"]) == ("engine_died", at + 1)
    assert error["message"].startswith("the engine died ")
    assert " times while it had this request: " in error["message"]
    assert (status.done, status.failed) == (39, 1)
    assert status.deaths == script.starts - 1
    again = Script(ours=ours, killers=killers)
    assert run(files, again).found == 40
    assert again.starts == 0  # and it is not tried again


@KINDS
def test_one_killer_of_many_costs_few_starts(tmp_path: Path, ours: int | None):
    count = 2000
    files = files_of(tmp_path, count)
    script = Script(ours=ours, killers=frozenset([prompt_number(1234)]))
    run(files, script)
    assert answers_in(files.output) == expected_answers(count) | {"r1234": None}
    assert script.starts <= 8
    assert max(script.asked.values()) <= 8


def test_several_killers_are_all_found(tmp_path: Path):
    count = 300
    files = files_of(tmp_path, count)
    killers = [3, 4, 150, 299]
    script = Script(killers=frozenset(map(prompt_number, killers)), shuffled=random.Random(0))
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(count) | {f"r{i}": None for i in killers}
    assert status.failed == 4
    assert script.starts <= 4 * 8


def test_a_killer_is_remembered_when_the_job_is_cancelled(tmp_path: Path):
    files = files_of(tmp_path, 40)
    killers = frozenset([prompt_number(7)])
    cancelled(files, Script(killers=killers, hold_after=25, shuffled=random.Random(1)))
    script = Script(killers=killers)
    run(files, script)
    assert answers_in(files.output) == expected_answers(40) | {"r7": None}
    assert script.starts <= 6


def test_what_killed_in_earlier_runs_is_known_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each run ends with the second death, before it could be sure of anything by itself."""
    monkeypatch.setattr(dispatch, "MAX_DEATHS", 2)
    files = files_of(tmp_path, 40)
    for _ in range(8):
        script = Script(killers=frozenset([prompt_number(7)]))
        with contextlib.suppress(JobError):
            run(files, script)
            break
    assert answers_in(files.output) == expected_answers(40) | {"r7": None}
    assert script.lists[0] == [prompt_number(7)]
    assert script.starts == 2


@KINDS
@pytest.mark.parametrize("seed", range(8))
def test_deaths_from_outside_condemn_nobody(tmp_path: Path, ours: int | None, seed: int):
    rng = random.Random(seed)
    count = 400
    files = files_of(tmp_path, count)
    deaths = [rng.choice([1, 2, 5, rng.randrange(1, 120)]) for _ in range(20)]
    script = Script(ours=ours, deaths=deaths, shuffled=rng)
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(count)
    assert status.failed == 0


def test_a_connection_that_breaks_off_condemns_nobody(tmp_path: Path):
    files = files_of(tmp_path, 50)
    script = Script(ours=None, replies={prompt_number(7): ["drop"], prompt_number(9): ["drop"]})
    run(files, script)
    assert answers_in(files.output) == expected_answers(50)


def test_a_list_that_ends_too_early_is_a_death(tmp_path: Path):
    files = files_of(tmp_path, 50)
    script = Script(replies={prompt_number(7): ["end"]})
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(50)
    assert status.deaths == 1
    assert str(status.note).endswith("left requests without an answer")


@KINDS
def test_a_server_that_only_dies_ends_the_job(tmp_path: Path, ours: int | None):
    files = files_of(tmp_path, 30)
    with pytest.raises(JobError) as caught:
        run(files, script := Script(ours=ours, deaths=[10] + [0] * 20))
    assert str(caught.value).startswith("the server was lost 8 times without an answer in between")
    told = "nothing that is done is lost, run the same command again"
    assert str(caught.value).endswith(told)
    assert script.starts == 8
    status = run(files, Script(ours=ours))
    assert status.found >= 9  # the last answers may die with their server
    assert answers_in(files.output) == expected_answers(30)


def test_counts_of_a_server_that_died_are_not_told(tmp_path: Path):
    files = files_of(tmp_path, 30)
    assert run(files, Script()).computed_tokens == 30
    files.output.unlink()
    assert run(files, Script(deaths=[5])).computed_tokens is None


# What a server says that is not the request's fault


@KINDS
@pytest.mark.parametrize("told", [429, 503, "abort"])
def test_what_is_not_the_requests_fault_is_tried_again(
    tmp_path: Path, ours: int | None, told: int | str
):
    files = files_of(tmp_path, 20)
    script = Script(ours=ours, replies={prompt_number(i): [told, told] for i in (0, 7, 19)})
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(20)
    assert status.failed == 0
    assert script.asked[prompt_number(7)] == 3
    assert script.asked[prompt_number(8)] == 1


@KINDS
def test_in_the_end_it_is_recorded(tmp_path: Path, ours: int | None):
    files = files_of(tmp_path, 3)
    replies: dict[str, list[int | str]] = {
        prompt_number(1): [503] * 9,
        prompt_number(2): ["abort"] * 9,
    }
    status = run(files, script := Script(ours=ours, replies=replies))
    by_id = {record["custom_id"]: record["response"] for record in records_in(files.output)}
    assert by_id["r1"]["status_code"] == 503
    assert by_id["r2"]["body"]["choices"][0]["finish_reason"] == "abort"
    assert script.asked[prompt_number(1)] == script.asked[prompt_number(2)] == 3
    assert len(by_id) == len(records_in(files.output)) == 3
    assert status.ended == 3


@KINDS
@pytest.mark.parametrize("status", [400, 404, 500])
def test_what_is_the_requests_fault_is_recorded_at_once(
    tmp_path: Path, ours: int | None, status: int
):
    files = files_of(tmp_path, 3)
    run(files, script := Script(ours=ours, replies={prompt_number(1): [status]}))
    assert answers_in(files.output)["r1"] is None
    assert script.asked[prompt_number(1)] == 1


@KINDS
@pytest.mark.parametrize("late", range(0, 40, 7))
def test_what_waits_to_be_sent_again_survives_a_death(tmp_path: Path, ours: int | None, late: int):
    """It is with no server then, and so not suspect."""
    files = files_of(tmp_path, 40)
    script = Script(
        ours=ours, deaths=[20, 10], replies={prompt_number(late): [503], prompt_number(3): [429]}
    )
    run(files, script)
    assert answers_in(files.output) == expected_answers(40)


@KINDS
def test_suspects_are_sent_again_when_the_server_is_busy(tmp_path: Path, ours: int | None):
    files = files_of(tmp_path, 40)
    replies: dict[str, list[int | str]] = {prompt_number(i): [503] for i in range(40)}
    script = Script(ours=ours, deaths=[1], replies=replies)
    run(files, script)
    assert answers_in(files.output) == expected_answers(40)


def test_lists_that_are_refused_are_sent_again(tmp_path: Path):
    files = files_of(tmp_path, 200)
    script = Script(refusals=3)
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(200)
    assert set(script.asked.values()) == {1}
    assert "has no room now" in str(status.note)
