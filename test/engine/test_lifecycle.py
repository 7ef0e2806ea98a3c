"""Aborts, vanished clients, retraction and lone requests leave no trace and harm nobody."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engines import ABORTED_IN_PREFILL, API_KEY, SERVER_PAGE_SIZE, flush, wait_until_whole
from prompts import distinct_tokens, mixed_batch
from sglang_batchllm.client.get_report import get_report

GATHER_SECONDS = 0.01  # the default of --batchllm-gather-ms


def greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


@pytest.fixture(scope="module")
def batch() -> list[list[int]]:
    return mixed_batch(60, seed=3)


@pytest.fixture(scope="module")
def undisturbed(engine, batch) -> list[list[int]]:
    return [r["output_ids"] for r in engine.generate(input_ids=batch, sampling_params=greedy(16))]


@pytest.mark.parametrize("kind", ["engine", "scarce_engine"])
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_aborts_leave_the_others_unchanged(request, kind, delay, batch, undisturbed):
    """Every third request is aborted: queued, in prefill or in decode, as the delay has it."""
    engine = request.getfixturevalue(kind)
    flush(engine)
    rids = [f"{kind}-{delay}-{i:03d}" for i in range(len(batch))]
    doomed = set(rids[::3])
    # The doomed ask for so much that they are still at it when the abort comes.
    params = [greedy(200 if rid in doomed else 16) for rid in rids]

    async def run() -> list[dict[str, Any]]:
        task = asyncio.ensure_future(
            engine.async_generate(input_ids=batch, sampling_params=params, rid=rids)
        )
        await asyncio.sleep(delay)
        for rid in doomed:
            engine.tokenizer_manager.abort_request(rid)
        return await task

    results = engine.loop.run_until_complete(run())
    for rid, result, expected in zip(rids, results, undisturbed, strict=True):
        if rid not in doomed:
            assert result["output_ids"] == expected
    reasons = [result["meta_info"]["finish_reason"]["type"] for result in results]
    aborted = reasons.count("abort")
    assert 0 < aborted <= len(doomed)
    last = wait_until_whole(engine)["batches"][-1]
    assert (last["finished"], last["aborted"]) == (len(batch) - aborted, aborted)


def test_aborting_a_leader_in_prefill_lets_another_compute_the_prefix(
    scarce_engine: Any, aborted_file: Path
) -> None:
    """The first request of a group is prefilled in chunks of 48 tokens, and aborted after one."""
    prefix = mixed_batch(1, seed=9)[0][:10] + list(range(10, 190))
    batch = [[*prefix, token] for token in range(20, 28)]
    flush(scarce_engine)
    expected = scarce_engine.generate(input_ids=batch, sampling_params=greedy(8))
    flush(scarce_engine)
    rids = [f"leader-{i}" for i in range(len(batch))]
    sampling = [greedy(8) | ABORTED_IN_PREFILL, *[greedy(8)] * (len(batch) - 1)]
    results = scarce_engine.generate(input_ids=batch, sampling_params=sampling, rid=rids)
    caught = [line.split() for line in aborted_file.read_text().splitlines()]
    assert [rid for rid, _ in caught] == rids[:1]
    assert 0 < int(caught[0][1]) < len(prefix)

    reasons = [result["meta_info"]["finish_reason"]["type"] for result in results]
    assert reasons == ["abort", *["length"] * (len(batch) - 1)]
    for result, reference in list(zip(results, expected, strict=True))[1:]:
        assert result["output_ids"] == reference["output_ids"]
    wait_until_whole(scarce_engine)


def test_a_client_that_vanishes_mid_stream_frees_its_batch(server, batch):
    flush(server)
    body = {"input_ids": batch, "sampling_params": greedy(400), "stream": True}
    with server.post("/generate", body, stream=True) as response:
        assert next(response.iter_lines())
    report = wait_until_whole(server.url, API_KEY)
    assert report["batches"][-1]["aborted"] > 0


def test_abort_all(server, batch):
    body = {"input_ids": batch, "sampling_params": greedy(400)}
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.post, "/generate", body)
        time.sleep(0.5)
        server.post("/abort_request", {"abort_all": True})
        results = pending.result().json()
    assert all(r["meta_info"]["finish_reason"]["type"] == "abort" for r in results)
    wait_until_whole(server.url, API_KEY)


def test_lone_requests_are_gathered_and_planned(server):
    """Many clients at once share prefixes like one batch does; later ones use SGLang's cache."""
    batch = mixed_batch(80, seed=11)
    flush(server)
    before = get_report(server.url, API_KEY)["total"]
    barrier = threading.Barrier(len(batch))

    def ask(prompt: list[int]) -> dict[str, Any]:
        barrier.wait()
        body = {"input_ids": prompt, "sampling_params": greedy(8)}
        return server.post("/generate", body).json()

    with ThreadPoolExecutor(len(batch)) as pool:
        results = list(pool.map(ask, batch))
    computed = sum(
        r["meta_info"]["prompt_tokens"] - r["meta_info"]["cached_tokens"] for r in results
    )
    report = wait_until_whole(server.url, API_KEY)
    total = report["total"]
    assert total["requests"] - before["requests"] == len(batch)
    assert total["grouped_requests"] > before["grouped_requests"], "planned together"
    assert report["kv_tokens"]["evictable"] > 0, "gathered prompts stay in SGLang's cache"
    # In later gatherings a prompt may come after its own extension, and computes its last page.
    least = distinct_tokens(batch, SERVER_PAGE_SIZE)
    assert least <= computed <= least + SERVER_PAGE_SIZE * len(batch) // 4


def test_a_lone_request_is_answered_while_a_batch_waits(server, batch):
    """It takes turns with a list that fills the server, and does not wait for its end."""
    body = {"input_ids": batch * 4, "sampling_params": greedy(100)}
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.post, "/generate", body)
        time.sleep(0.3)
        lone = server.post(
            "/generate", {"input_ids": [5, 6, 7], "sampling_params": greedy(2)}
        ).json()
        assert lone["meta_info"]["completion_tokens"] == 2
        assert not pending.done()
        assert len(pending.result().json()) == 4 * len(batch)


def test_a_lone_request_waits_no_longer_than_the_gathering(server):
    """A list of two is never gathered, so it tells what a request takes without it."""

    def seconds(prompts: Any) -> float:
        started = time.perf_counter()
        body = {"input_ids": prompts, "sampling_params": greedy(1)}
        assert server.post("/generate", body).ok
        return time.perf_counter() - started

    lone, listed = [], []
    for number in range(30):  # the least of many is what a busy machine has no part in
        lone.append(seconds([9, 8, number]))
        listed.append(seconds([[7, 6, number], [5, 4, number]]))
    assert min(lone) - min(listed) < GATHER_SECONDS
