"""The simulator against what can be computed by hand, and what it must not lose."""

import json
import os

import pytest
import tinyrun

from sera_core.config import SeraConfig
from sera_core.errors import InputError
from tests.scale import __main__ as scale
from tests.scale.measured_times import RoundTimes, StepTimes, replay, round_times
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


def test_a_round_is_replayed_with_more_workers():
    times = RoundTimes([StepTimes("sample", 64_000, 1000.0)], others_s=500.0, pairs=1000)
    rate = times.shared[0].rates()
    assert rate.shard_s == 1.0
    one, eight = (replay(times, 1000, workers) for workers in (1, 8))
    assert one["faster"] < 1 < eight["faster"] < 3  # 500 of 1,500 seconds are shared by nobody
    assert one["others_s"] == eight["others_s"] == 500.0
    assert replay(times, 2000, 8)["others_s"] == 1000.0
    assert eight["shared_s"] == pytest.approx(1000 / 8, rel=0.3)


@pytest.mark.slow
def test_the_times_are_those_of_the_run(tmp_path, monkeypatch):
    written = tmp_path / "latest.json"
    monkeypatch.setattr(scale, "LATEST", written)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # put back at the end
    settings = tinyrun.settings(tmp_path, limits={"rounds": 2}, execution={"child": "never"})
    records = tinyrun.work(SeraConfig.model_validate(settings), tmp_path / "store")
    times = round_times(str(tmp_path / "store"), records.run)
    last = records.rounds()[-1]
    assert times.pairs == 24
    assert sorted(part.rows for part in times.shared if part.step == "sample") == [4, 10]  # held-out, train
    assert sum(part.step == "logps" for part in times.shared) >= 1
    assert times.others_s > 0
    assert len(last.used) > len(times.shared)

    scale.main(["--replay", str(tmp_path / "store"), records.run, "--pairs", "2400"])
    rows = json.loads(written.read_text())["replay"]
    assert [row["workers"] for row in rows] == [1, 8, 64, 1024]
    assert all(row["pairs"] == 2400 and row["others_s"] == round(100 * times.others_s, 1) for row in rows)
    assert rows[0]["makespan_s"] > rows[-1]["makespan_s"] > rows[-1]["others_s"]
    with pytest.raises(InputError, match="no finished round"):
        round_times(str(tmp_path / "store"), "another")
