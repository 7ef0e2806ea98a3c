"""The model of replicas: nothing is lost or run twice but what died, and levelling helps."""

from dataclasses import replace

import numpy as np
import pytest

from replica_model import Units, World, play, units_of
from sglang_batchllm.planning import Costs, partition, plan_batch

REPLICAS = 4


def world(levels: bool, slow: float = 1.0, deaths: tuple[tuple[float, int], ...] = ()) -> World:
    slowness = np.ones(REPLICAS)
    slowness[0] = slow
    return World(
        slowness, [*deaths], restart=5.0, window=2.0, ahead=3.0, levels=levels, per_request=0.0
    )


@pytest.fixture
def units() -> Units:
    """200 of a second each, 50 in each shard."""
    count = 200
    ones = np.ones(count)
    return Units(
        np.arange(count) % REPLICAS, np.ones(count, int), ones, ones, ones * 7, ones * 3, 0
    )


@pytest.mark.parametrize("levels", [False, True])
def test_equal_replicas_lose_nothing(units, levels):
    outcome = play(units, world(levels))
    assert outcome.seconds == outcome.best == 50
    assert outcome.lost == outcome.repeated_tokens == 0


def test_a_slow_replica_is_helped(units):
    alone, helped = (play(units, world(levels, slow=2.0)) for levels in (False, True))
    assert alone.seconds == 100
    assert helped.best == 200 / 3.5
    assert helped.best <= helped.seconds <= helped.best + 2 * (3.0 + 1)
    assert helped.repeated_tokens > 0


def test_what_a_replica_had_begins_anew_when_it_dies(units):
    outcome = play(units, world(False, deaths=((10.5, 1),)))
    assert outcome.lost == 5 + 3  # the restart, one unit that ran, and two of the window
    assert outcome.repeated_tokens == 3 * 7
    assert outcome.seconds == 10.5 + 5 + 50 - 8
    helped = play(units, world(True, deaths=((10.5, 1),)))
    assert helped.seconds < outcome.seconds


def test_a_death_at_the_end_wakes_those_that_are_done(units):
    """Its last units run elsewhere before it is back."""
    late = replace(world(True, deaths=((49.5, 0),)), restart=50.0)
    assert play(units, late).seconds < 60


@pytest.mark.parametrize(("per_request", "seconds"), [(0.2, 50), (0.25, 50), (0.5, 100)])
def test_a_coordinator_is_the_limit_once_it_is_slower_than_all_replicas(
    units, per_request, seconds
):
    """Four replicas end four requests a second."""
    led = play(units, replace(world(True), per_request=per_request))
    assert led.coordinating == pytest.approx(200 * per_request)
    assert seconds <= led.seconds <= seconds * 1.1
    cut_beforehand = play(units, replace(world(False), per_request=per_request))
    assert (cut_beforehand.seconds, cut_beforehand.coordinating) == (50, 0)


def test_units_of_a_plan_take_what_its_partition_says():
    documents = [[number] * 60 for number in range(40)]
    prompts = [[*documents[i % 40], 100 + i, 3] for i in range(400)]
    outputs = np.full(400, 10)
    plan, costs = plan_batch(prompts, 1, outputs), Costs()
    units = units_of(plan, REPLICAS, outputs, [outputs, outputs], costs)
    cut = partition(plan, REPLICAS, outputs, costs)
    assert units.requests.sum() == 800
    assert units.tokens.sum() == 2 * plan.report.distinct_tokens
    seconds = np.bincount(units.shard, units.seconds)
    assert seconds == pytest.approx(2 * cut.seconds, rel=0.02)
    outcome = play(units, world(True))
    assert outcome.best <= outcome.seconds <= outcome.best * 1.5
