"""LD-DPO and WPO in the loop: what a run trains with, read from its artifacts and computed again."""

import json

import pyarrow.parquet as pq
import pytest
import tinyrun
from trainable import logps

from flows.store_tools.verify import verify
from sera_core.artifacts.manifest import Artifact
from sera_core.models.policies import load_policy

pytestmark = pytest.mark.slow
ALPHA = 0.25


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ld")
    train = {"losses": ["sigmoid", "sft"], "ld_alpha": ALPHA, "pair_weights": "wpo"}
    return tinyrun.work(tinyrun.config(folder, train=train), folder / "store")


def artifacts(run, number):
    return {role: Artifact(run.store, ref) for role, ref in run.rounds()[number].steps.items()}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_reference_of_every_pair_counts_the_longer_answers_end_as_the_policy_does(run, number):
    mixture = artifacts(run, number)["mixture"]
    model = Artifact(run.store, mixture.record.inputs["rendered"]).record.inputs["model"]
    reference = load_policy(Artifact(run.store, model).folder("policy"))
    rows = pq.read_table(mixture.path("mixture.parquet")).to_pylist()
    longer = 0
    for row in rows:
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            whole, part = (logps(reference, row["prompt_ids"], some) for some in (ids, ids[:shared]))
            assert row[f"ref_{side}_logps"] == pytest.approx(part + ALPHA * (whole - part), abs=1e-4)
            longer += len(ids) > shared
    assert longer > 3 and {row["origin"] for row in rows} == (
        {"human"} if number == 0 else {"human", "generated"}
    )


def test_margins_are_reviewed_with_all_tokens(run):
    scored = artifacts(run, 1)["scored"]
    assert "ld_alpha" not in Artifact(run.store, scored.record.inputs["reference-000"]).record.fields


def test_policy_and_reference_agree_at_step_0_and_pairs_are_weighted(run):
    policy = artifacts(run, 0)["policy"]
    assert policy.record.metrics["step0/largest_margin"] <= policy.record.metrics["step0/bound"]
    log = [json.loads(line) for line in policy.path("log.jsonl").read_text().splitlines()]
    assert len({line["pair_weight"] for line in log}) == len(log) and all(
        line["pair_weight"] > 0 for line in log
    )


def test_the_run_verifies(run):
    assert verify(run).rounds == 3
