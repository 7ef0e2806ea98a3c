"""The simulator: nothing is computed twice, memory holds, all finish; and its cost model."""

import random
from itertools import pairwise

import pytest

from cost_model import CostModel, Work, fit
from engine_model import Policy, list_model
from sglang_batchllm.policy.admission import level
from steps import Step

POLICIES = [Policy(chunk, mixes) for chunk in (64, 256) for mixes in ("none", "all")]
MODEL = CostModel(
    decode_step_ms=2.5,
    prefill_step_ms=4.0,
    token_ms=0.022,
    least_tokens=128,
    pair_ms=1.1e-6,
    kv_ms=3.3e-5,
    context_ms=1e-6,
    eager_host_ms=14.0,
    mixed_host_ms=25.0,
    graph_host_ms=1.0,
    ingest_ms=1e-4,
)


def make_batch(seed: int) -> tuple[list[list[int]], list[int]]:
    """Two levels of shared prefixes, some prompts equal, outputs of any length up to 40."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(rng.randint(2, 6)):
        top = [rng.randrange(1000) for _ in range(rng.randint(0, 120))]
        for _ in range(rng.randint(1, 4)):
            middle = top + [rng.randrange(1000) for _ in range(rng.randint(1, 60))]
            for _ in range(rng.randint(1, 5)):
                suffix = [rng.randrange(1000) for _ in range(rng.randint(0, 30))]
                prompts.append(middle + suffix)
    return prompts, [rng.randint(1, 40) for _ in prompts]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_everything_finishes_within_memory(policy, seed):
    prompts, outputs = make_batch(seed)
    for capacity in (400, 1000, 100_000):
        engine, requests = list_model(prompts, outputs, capacity, policy)
        works = engine.run()
        assert all(request.end == "length" for request in requests)
        assert [len(request.output_ids) for request in requests] == outputs
        assert max(work.kv_used for work in works) <= capacity
        assert max(work.prefill_tokens for work in works) <= policy.chunk
        assert (engine.pool.used, engine.pool.available) == (0, capacity)
        (report,) = engine.policy.report()["batches"]
        computed = sum(work.prefill_tokens for work in works)
        if report["retractions"] or report["relaxed_tokens"]:
            assert computed >= report["distinct_tokens"]
        else:
            assert computed == report["distinct_tokens"] == report["computed_tokens"]


def test_decode_rows_ride_along_only_when_mixed():
    prompts, outputs = make_batch(0)
    for mixes in ("none", "short", "all"):  # none of them is short
        works = list_model(prompts, outputs, 100_000, Policy(64, mixes))[0].run()
        mixed = any(work.prefill_tokens and work.decode_requests for work in works)
        assert mixed == (mixes == "all")


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_more_memory_is_not_slower(policy):
    prompts, outputs = make_batch(1)
    seconds = [
        MODEL.seconds(list_model(prompts, outputs, capacity, policy)[0].run(), 256, 0)
        for capacity in (400, 800, 1600, 100_000)
    ]
    for less, more in pairwise(seconds):
        assert more <= 1.05 * less


def decode_rows(outputs: list[int]) -> tuple[list[int], float]:
    """Rows of each decode step of 25 groups of 16 requests, and the seconds predicted."""
    rng = random.Random(0)
    prompts = []
    for group in range(25):
        prefix = [group] * 300
        prompts += [prefix + [1000 + rng.randrange(1000) for _ in range(20)] for _ in range(16)]
    works = list_model(prompts, outputs, 100_000, Policy(2048))[0].run()
    return [w.decode_requests for w in works if not w.prefill_tokens], MODEL.seconds(works, 1024, 0)


def test_outputs_of_mixed_length_make_level_steps(monkeypatch):
    rng = random.Random(1)
    outputs = [min(1 + int(rng.expovariate(1 / 80)), 400) for _ in range(400)]
    level_rows, level_seconds = decode_rows(outputs)
    assert max(level_rows) < level.ENOUGH_ROWS + 2048 / 20
    monkeypatch.setattr(level, "ENOUGH_ROWS", 10**6)
    rows, seconds = decode_rows(outputs)
    assert len(level_rows) == len(rows) == max(outputs), "no step more than the longest takes"
    assert max(rows) == 400
    assert level_seconds < 0.97 * seconds


def test_outputs_of_one_length_start_at_once():
    rows, _ = decode_rows([50] * 400)
    assert rows == [400] * 50


def test_a_shared_prefix_is_read_once_by_its_group():
    prompts = [[1] * 50 + [number] for number in range(2, 6)]
    works = list_model(prompts, [5] * 4, 10_000, Policy())[0].run()
    last = works[-1]
    assert last.decode_requests == 4
    assert last.context - last.unique_kv == 3 * 50


def test_the_cost_model_is_found_again():
    runs, played = [], []
    for groups, members, prefix, suffix in ((10, 20, 500, 50), (60, 1, 0, 2000), (5, 60, 2000, 20)):
        rng = random.Random(groups)
        prompts = []
        for _ in range(groups):
            shared = rng.choices(range(9000), k=prefix)
            prompts += [shared + rng.choices(range(9000), k=suffix) for _ in range(members)]
        outputs = [rng.randint(20, 200) for _ in prompts]
        works = list_model(prompts, outputs, 1_000_000, Policy(4096))[0].run()
        ends = MODEL.ends(works, 1024)
        starts = [0.0, 0.014, *ends[:-2]]  # a step is launched when the last but one is done
        steps = [
            list(vars(step_of(work, start, MODEL.host_ms(work, 1024))).values())
            for work, start in zip(works, starts, strict=True)
        ]
        runs.append({"steps": steps, "seconds": float(ends[-1]), "prompt_tokens": 1})
        played.append(works)
    found = fit(runs)
    for name in ("token_ms", "kv_ms", "context_ms", "eager_host_ms", "graph_host_ms"):
        assert getattr(found, name) == pytest.approx(getattr(MODEL, name), rel=0.1), name
    for works in played:
        ends = found.ends(works, 1024)
        assert ends[-1] == pytest.approx(MODEL.ends(works, 1024)[-1], rel=0.02)


def step_of(work: Work, start: float, host_ms: float) -> Step:
    return Step(
        start=start,
        prefill_tokens=work.prefill_tokens,
        prefill_requests=0,
        attended=work.attended,
        decode_requests=work.decode_requests,
        context=work.context,
        kv_used=work.kv_used,
        waiting=0,
        schedule_ms=0.0,
        launch_ms=host_ms,
    )


def test_host_time_shows_only_where_the_gpu_is_faster():
    small = Work(0, 0, 1, 100, 100, 100)
    gpu_ms = MODEL.gpu_ms(small)
    assert MODEL.graph_host_ms < gpu_ms < MODEL.eager_host_ms
    assert MODEL.ends([small] * 100, 256)[-1] == pytest.approx(0.1 * gpu_ms, rel=0.05)
    assert MODEL.ends([small] * 100, 0)[-1] == pytest.approx(0.1 * 14.0, rel=0.05)
