"""Pairs made of the arithmetic's noise are not kept: whole rounds on a tiny policy."""

import json

import pytest
import tinyrun

from flows import cli
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact


def second_round(folder, rate, **sections):
    changes = {"train": {"learning_rate": rate}, "limits": {"rounds": 2}, "sampling": {"responses": 8}}
    config = tinyrun.config(folder, **(changes | sections))
    return tinyrun.work(config, folder / "store"), tinyrun.work(config, folder / "store").rounds()[1]


def test_in_bfloat16_a_policy_that_did_not_move_gives_no_pair(tmp_path):
    records, round = second_round(tmp_path, 1e-12, model={"dtype": "bfloat16"})
    assert round.pairs == {"human": 0, "generated": 0} and round.stop_reason == "no_pairs"
    paired = {row["pair_id"] for row in rows(records, round, "responses", "pairs.parquet")}
    assert not paired, "best and worst answer have the same reward where policy and reference are the same"


def test_in_bfloat16_the_floor_is_measured_and_no_kept_margin_is_below_it(tmp_path):
    records, round = second_round(tmp_path, 1e-3, model={"dtype": "bfloat16"})
    human, generated = (round.metrics[f"margin_noise_nats{kind}"] for kind in ("", "_generated"))
    assert human > 0.05 and generated > human, "the best and the worst of eight lie further apart by chance"
    for row in rows(records, round, "mixture", "ledger.parquet"):
        if row["kept"]:
            assert row["ensemble_margin"] > (human if row["origin"] == "human" else generated)


def test_in_float32_the_floor_is_small_and_shown(tmp_path, capsys):
    records, round = second_round(tmp_path, 1e-3)
    assert 0 < round.metrics["margin_noise_nats"] < 1e-3
    assert cli.main(["show", "tiny", "--store", records.store.url, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["rounds"][1]["metrics"]
    assert shown["margin_noise_nats"] == round.metrics["margin_noise_nats"]
    page = Artifact(records.store, round.steps["report"]).path("report.html").read_text()
    assert "Noise of the arithmetic alone" in page


@pytest.mark.parametrize(("floor", "least"), [(0.0, True), (float("-inf"), False), (1e9, False)])
def test_the_noise_is_the_least_floor_unless_the_floor_is_off(tmp_path, floor, least):
    sections = {"select": {"min_margin": floor}, "select_generated": {"min_margin": floor}}
    records, round = second_round(tmp_path, 1e-3, **sections)
    record = Artifact(records.store, round.steps["human"]).record
    if least:
        assert record.metrics["floor_nats"] == round.metrics["margin_noise_nats"]
    else:
        assert record.metrics.get("floor_nats", floor) == floor


def rows(records, round, role, file):
    return list(schema.iter_rows(Artifact(records.store, round.steps[role]).path(file)))
