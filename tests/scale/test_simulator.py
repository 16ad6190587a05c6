"""The simulator against what can be computed by hand, and what it must not lose."""

import pytest

from tests.scale.simulator import COMMIT_WRITES, PREFIX_WRITES_PER_S, SCORING, Rates, simulate

EVEN = Rates(shard_s=2.0, spread=0.0, straggling=0.0, lost_per_hour=1e-12)


def test_equal_shards_take_the_rounds_that_the_workers_need():
    told = simulate(1000, 16, EVEN, seed=1)
    each = EVEN.shard_s + COMMIT_WRITES * EVEN.request_s
    assert told["makespan_s"] == pytest.approx(63 * each)  # 1000 / 16 is 62.5
    assert told["utilisation"] == pytest.approx(1000 / (16 * 63), abs=1e-3)
    assert (told["lost_workers"], told["shards_repeated"]) == (0, 0)


def test_lost_workers_cost_the_shards_under_way():
    rates = Rates(shard_s=10.0, lost_per_hour=5.0, replaced_s=60.0)
    told = simulate(2000, 16, rates, seed=2)
    assert told["lost_workers"] > 10
    assert told["shards_repeated"] >= told["lost_workers"] // 2
    assert 0.7 < told["utilisation"] < 1


def test_the_store_takes_what_1_024_workers_write():
    rows, rates = SCORING
    told = simulate(1_000_000 // rows, 1024, rates, seed=3)
    assert 100 < told["store_requests_per_s"] < PREFIX_WRITES_PER_S
