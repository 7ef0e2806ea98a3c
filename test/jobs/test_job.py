"""Whole jobs with servers that are made up, whatever dies in between."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pretended_server import (
    IDENTITY,
    KINDS,
    MODEL,
    Pretending,
    Script,
    answers_in,
    cancelled,
    expected_answers,
    files_of,
    job_of,
    prompt_number,
    records_in,
    request,
    run,
    serving,
)
from sglang_batchllm.jobs import hosts
from sglang_batchllm.jobs.errors import JobError
from sglang_batchllm.jobs.hosts import Running
from sglang_batchllm.jobs.job import Files, run_job
from sglang_batchllm.jobs.server import Request, Server
from sglang_batchllm.jobs.status import Counts
from sglang_batchllm.wire.lines import CHAT, COMPLETIONS


def missing_from(files: Files, count: int) -> Counter[str]:
    """Prompts of rows without a record."""
    done = answers_in(files.output)
    return Counter(prompt_number(i) for i in range(count) if f"r{i}" not in done)


# Answers


@KINDS
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_every_row_is_answered_once(tmp_path: Path, ours: int | None, url: str):
    files = files_of(tmp_path, 700, url)
    script = Script(ours=ours, shuffled=random.Random(0))
    status = run(files, script)
    assert answers_in(files.output) == expected_answers(700)
    assert set(script.asked.values()) == {1}
    assert (status.done, status.failed, status.total, status.found) == (700, 0, 700, 0)
    assert status.output_tokens == 1400
    assert status.phase == "done"
    assert not script.deaths and script.starts == 1


def test_nothing_but_the_output_and_its_memory_is_left(tmp_path: Path):
    run(files_of(tmp_path, 5), Script())
    names = {"in.jsonl", "out.jsonl", "out.jsonl.batchllm"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_empty_input_has_an_empty_output(tmp_path: Path):
    files = files_of(tmp_path, 0)
    assert run(files, Script()).counts == Counts(0, 0, 0)
    assert files.output.read_bytes() == b""


def test_several_windows_are_in_flight_in_the_order_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    count = 3000
    files = files_of(tmp_path, count)
    script = Script(hold_after=0)
    sent: list[int] = []
    run_list = Server.run_list

    def noting(self: Server, requests: Sequence[Request]) -> Any:
        sent.extend(one.row for one in requests)
        return run_list(self, requests)

    monkeypatch.setattr(Server, "run_list", noting)  # what is in flight may arrive in any order

    async def main() -> None:
        running = asyncio.create_task(job_of(files, Pretending(script)).run())
        await asyncio.to_thread(script.wait_for_lists, 4)
        assert len(script.asked) < 1100  # and no more before these are answered
        script.release()
        await running

    asyncio.run(main())
    assert sum(map(len, script.lists)) == count
    # All of a topic, then the next one.
    topics = [prompt_number(row).split(":")[0] for row in sent]
    changes = sum(before != topic for before, topic in pairwise(topics))
    assert changes == 6
    assert answers_in(files.output) == expected_answers(count)


def test_waiting_for_answers_is_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits = 0
    wait = asyncio.wait

    async def counting(*args: Any, **options: Any) -> Any:
        nonlocal waits
        waits += 1
        return await wait(*args, **options)

    monkeypatch.setattr(asyncio, "wait", counting)
    script = Script(hold_after=1)
    files = files_of(tmp_path, 30)

    async def main() -> None:
        running = asyncio.create_task(job_of(files, Pretending(script)).run())
        await asyncio.to_thread(script.held.wait)
        await asyncio.sleep(0.2)  # as an engine takes its time
        script.release()
        await running

    asyncio.run(main())
    assert waits <= 2 * 30


def test_params_reach_the_server(tmp_path: Path):
    files = files_of(tmp_path, 2)
    path = files.inputs[0]
    path.write_bytes(path.read_bytes() + request("own", temperature=1))
    script = Script()
    run(files, script, params={"temperature": 0.5})
    told = [body.get("temperature") for body in script.bodies]
    assert sorted(told) == [0.5, 0.5, 1]


# Resuming


@KINDS
@pytest.mark.parametrize("after", [0, 1, 100, 699])
def test_a_cancelled_job_goes_on_with_what_is_missing(tmp_path: Path, ours: int | None, after: int):
    count = 700
    files = files_of(tmp_path, count)
    status = cancelled(files, Script(ours=ours, hold_after=after, shuffled=random.Random(after)))
    missing = missing_from(files, count)
    assert count - len(missing) == status.done <= after
    script = Script(ours=ours)
    status = run(files, script)
    assert script.asked == missing
    assert answers_in(files.output) == expected_answers(count)
    assert (status.found, status.done) == (count - len(missing), count)
    assert status.output_tokens == 2 * count
    assert status.output_tokens_before == 2 * status.found


def test_a_job_is_cancelled_again_and_again(tmp_path: Path):
    files = files_of(tmp_path, 300)
    asked: Counter[str] = Counter()
    for seed in range(6):
        script = Script(hold_after=40, shuffled=random.Random(seed))
        cancelled(files, script)
        answers_in(files.output)
    asked = missing_from(files, 300)
    script = Script()
    run(files, script)
    assert script.asked == asked
    assert answers_in(files.output) == expected_answers(300)


def test_an_output_cut_anywhere_is_completed(tmp_path: Path):
    files = files_of(tmp_path, 30)
    run(files, Script())
    whole = files.output.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 12):
        files.output.write_bytes(whole[:cut])
        status = run(files, Script())
        assert status.found == whole.count(b"\n", 0, cut)
        assert answers_in(files.output) == expected_answers(30)


def test_a_job_that_is_done_starts_no_server(tmp_path: Path):
    files = files_of(tmp_path, 10)
    run(files, Script())
    before = files.output.read_bytes()
    script = Script()
    status = run(files, script)
    assert (script.starts, status.found, status.done) == (0, 10, 10)
    assert files.output.read_bytes() == before


def test_inputs_may_be_named_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "b.jsonl").write_bytes(b"no json\n" + request("killer"))
    files = files_of(tmp_path, 10)
    files = replace(files, inputs=(*files.inputs, tmp_path / "b.jsonl"))
    cancelled(files, Script(hold_after=10, killers=frozenset(["killer"])))
    monkeypatch.chdir(tmp_path)
    moved = replace(files, inputs=(Path("in.jsonl"), Path("b.jsonl")))
    script = Script(killers=frozenset(["killer"]))
    for _ in range(2):
        run(moved, script)
        starts = script.starts
    assert len(answers_in(files.output)) == len(records_in(files.output)) == 12
    run(moved, script)
    assert script.starts == starts
    with pytest.raises(JobError, match="the input has changed"):
        run(replace(moved, inputs=moved.inputs[:1]), script)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("input", "the input has changed since then"),
        ("model", f"it was begun with model {MODEL}, and this is other"),
        ("params", "it was begun with parameters {}, and these are {'max_tokens': 5}"),
    ],
)
def test_another_job_is_named_and_not_mixed_in(tmp_path: Path, change: str, told: str):
    files = files_of(tmp_path, 10)
    cancelled(files, Script(hold_after=5))
    before = files.output.read_bytes()
    options: dict[str, Any] = {}
    if change == "input":
        files_of(tmp_path, 11)
    elif change == "model":
        options["model"] = {"name": "other", "files": None}
    else:
        options["params"] = {"max_tokens": 5}
    with pytest.raises(JobError) as caught:
        run(files, script := Script(), **options)
    assert str(caught.value) == (
        f"{files.output} belongs to another job: {told}; name another output, or delete "
        f"{files.output} and {files.output}.batchllm"
    )
    assert files.output.read_bytes() == before
    assert not script.asked
    files_of(tmp_path, 10)
    assert run(files, Script()).done == 10  # as it was


def test_records_of_somebody_else_are_left_alone(tmp_path: Path):
    files = files_of(tmp_path, 3)
    run(files, Script())
    (tmp_path / "out.jsonl.batchllm").unlink()
    before = files.output.read_bytes()
    with pytest.raises(JobError, match="has records, but none of a run like this"):
        run(files, script := Script())
    assert files.output.read_bytes() == before
    assert not script.asked


def test_an_input_named_as_output_is_left_alone(tmp_path: Path):
    files = files_of(tmp_path, 3)
    path = files.inputs[0]
    path.write_bytes(path.read_bytes().rstrip())
    before = path.read_bytes()
    with pytest.raises(JobError, match="something else than"):
        run(Files((path,), path), Script())
    assert path.read_bytes() == before


def test_two_runs_of_one_output_are_refused(tmp_path: Path):
    files = files_of(tmp_path, 10)
    script = Script(hold_after=3)

    async def main() -> None:
        first = asyncio.create_task(job_of(files, Pretending(script)).run())
        assert await asyncio.to_thread(script.held.wait, 10)
        with pytest.raises(JobError) as caught:
            await job_of(files, Pretending(script)).run()
        told = f"another run writes {files.output}; wait for it, or stop it"
        assert str(caught.value) == told
        script.release()
        await first

    asyncio.run(main())
    assert answers_in(files.output) == expected_answers(10)


def test_a_full_disk_stops_a_job_which_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = files_of(tmp_path, 100)
    write, left = os.write, 20

    def write_some(fd: int, data: bytes) -> int:
        nonlocal left
        if b"batch_req" in data:
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write_some)
        with pytest.raises(JobError, match=r"out\.jsonl can't be written: the disk is full"):
            run(files, Script())
    assert len(answers_in(files.output)) == 20
    assert run(files, Script()).found == 20
    assert answers_in(files.output) == expected_answers(100)


# Servers that somebody else runs


def run_at(url: str, files: Files, api_key: str | None = None) -> Counts:
    return asyncio.run(run_job(files, Server(url, api_key)))


@KINDS
def test_a_server_that_runs_is_asked_what_it_serves(tmp_path: Path, ours: int | None):
    files = files_of(tmp_path, 5)
    path = files.inputs[0]
    path.write_bytes(path.read_bytes() + request("x", model="other"))
    with serving(Script(ours=ours, models=(MODEL, "second"))) as server:
        assert run_at(server.url, files) == Counts(6, 5, 1)
        assert run_at(server.url, files) == Counts(6, 5, 1)
    errors = [record["error"] for record in records_in(files.output) if record["error"]]
    assert [error["message"] for error in errors] == [
        f'model is "other"; served is {MODEL} or second'
    ]


def test_an_api_key_that_is_missing_is_said(tmp_path: Path):
    files = files_of(tmp_path, 5)
    with serving(Script(api_key="secret")) as server:
        for wrong in (None, "other"):
            with pytest.raises(JobError) as caught:
                run_at(server.url, files, wrong)
            told = f"{server.url} wants an API key; give it with --api-key"
            assert str(caught.value) == told
        assert run_at(server.url, files, "secret") == Counts(5, 5, 0)


def test_where_nobody_answers_that_is_said(tmp_path: Path):
    with serving(Script()) as server:
        url = server.url
    with pytest.raises(JobError) as caught:
        run_at(url, files_of(tmp_path, 5))
    assert str(caught.value).startswith(f"{url} does not answer: ")
    assert str(caught.value).endswith("; start it, or name another one")


def test_a_server_that_stays_away_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "BACK_SECONDS", 0.05)
    files = files_of(tmp_path, 50)
    with serving(Script(deaths=[20])) as server, pytest.raises(JobError) as caught:
        run_at(server.url, files)
    assert str(caught.value).endswith(
        "; nothing that is done is lost, run the same command again once the server is back"
    )
    with serving(Script()) as server:
        assert run_at(server.url, files) == Counts(50, 50, 0)
    assert answers_in(files.output) == expected_answers(50)


def test_only_one_endpoint_may_be_allowed(tmp_path: Path):
    files = files_of(tmp_path, 2)
    path = files.inputs[0]
    path.write_bytes(path.read_bytes() + request("x", url=COMPLETIONS))
    seen: list[Counts] = []

    async def main(url: str) -> Counts:
        return await run_job(files, Server(url), url=CHAT, watch=seen.append)

    with serving(Script()) as server:
        assert asyncio.run(main(server.url)) == Counts(3, 2, 1) == seen[-1]
    done = [counts.done + counts.failed for counts in seen]
    assert done == sorted(done)


def test_a_lost_server_is_left_closed(tmp_path: Path):
    """No session stays open, whatever the end."""
    files = files_of(tmp_path, 5)
    with serving(Script()) as pretended:
        server = Server(pretended.url)

        async def main() -> None:
            await job_of(files, Running(server), model=None).run()
            assert server._session is None

        asyncio.run(main())


def test_others_go_first_on_a_server_that_somebody_else_runs(tmp_path: Path):
    script = Script()
    with serving(script) as server:
        asyncio.run(run_job(files_of(tmp_path, 3), Server(server.url), url=CHAT, watch=print))
    assert script.yielding == [True]


def test_a_connection_that_idled_is_not_used_again():
    """The server closes it, which a process that is busy meanwhile does not see."""

    async def main(url: str) -> int:
        server = Server(url)
        await server.open()
        await server.about()
        time.sleep(0.5)  # the loop stands still, as while a window is encoded
        asked = [Request(0, COMPLETIONS, b'{"prompt": "p"}')]
        try:
            return len([answer async for answer in server.run_list(asked)])
        finally:
            await server.close()

    with serving(Script(keeps_alive=0.1)) as server:
        assert asyncio.run(main(server.url)) == 1


# Before anything runs


def test_an_input_that_is_missing_is_named(tmp_path: Path):
    files = replace(files_of(tmp_path, 3), inputs=(tmp_path / "missing.jsonl",))
    with pytest.raises(JobError) as caught:
        run(files, Script())
    told = "No such file or directory; nothing has run yet"
    assert str(caught.value) == f"{tmp_path / 'missing.jsonl'}: {told}"


def test_a_server_that_does_not_start_ends_the_job(tmp_path: Path):
    class Broken(Pretending):
        async def start(self) -> Any:
            raise JobError("the engine did not start: no GPU")

    with pytest.raises(JobError, match="the engine did not start: no GPU"):
        asyncio.run(job_of(files_of(tmp_path, 3), Broken(Script()), IDENTITY).run())
