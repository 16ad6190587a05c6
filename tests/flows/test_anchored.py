"""Anchored rejection in the loop: the start policy's worst response against the head's best."""

import pyarrow.parquet as pq
import pytest
import tinyrun

from flows.store_tools.verify import verify
from sera_core.artifacts.manifest import Artifact
from sera_core.reporting.round_page import round_page

pytestmark = pytest.mark.slow
R = 3


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """(run, artifacts by role of rounds 1 and 2)."""
    folder = tmp_path_factory.mktemp("anchored")
    run = tinyrun.work(tinyrun.config(folder, pairing={"rule": "best-anchored"}), folder / "store")
    made = [{role: Artifact(run.store, ref) for role, ref in one.steps.items()} for one in run.rounds()]
    assert len(made) == 3
    return run, made[1:]


def rows(artifact, file):
    return pq.read_table(artifact.path(file)).to_pandas()


def test_the_start_policy_answers_the_same_prompts_beside_the_head(rounds):
    for made in rounds[1]:
        inputs = made["samples"].record.inputs
        anchors = Artifact(made["samples"].store, inputs["anchors"])
        assert anchors.record.inputs["policy"] == made["model"].ref != inputs["policy"]
        all_rows, own = rows(made["responses"], "responses.parquet"), rows(anchors, "responses.parquet")
        beside = all_rows[all_rows["sample"] >= R].reset_index(drop=True)
        assert beside["prompt_id"].equals(own["prompt_id"]) and beside["response"].equals(own["response"])
        assert (beside["sample"] - R).equals(own["sample"]) and len(all_rows) == 2 * len(own)
        assert all_rows[["policy_logps", "ref_logps", "ensemble_reward"]].notna().all(axis=None)


def test_each_pair_is_the_heads_best_against_the_start_policys_worst(rounds):
    for made in rounds[1]:
        responses = rows(made["responses"], "responses.parquet")
        best = responses[responses["sample"] < R].groupby("prompt_id")["ensemble_reward"].max()
        worst = responses[responses["sample"] >= R].groupby("prompt_id")["ensemble_reward"].min()
        rewards = responses.set_index(["prompt_id", "sample"])["ensemble_reward"]
        pairs = rows(made["responses"], "pairs.parquet").merge(
            rows(made["responses"], "pair_samples.parquet"), on="pair_id"
        )
        assert len(pairs) > 2
        for pair in pairs.itertuples():
            assert rewards[pair.prompt_id, pair.chosen_sample] == best[pair.prompt_id]
            assert rewards[pair.prompt_id, pair.rejected_sample] == worst[pair.prompt_id]
            assert pair.chosen_sample < R <= pair.rejected_sample
        without = rows(made["responses"], "ledger.parquet").set_index("prompt_id")["reason"]
        for prompt in without.index[without == "anchor_not_below"]:
            assert best[prompt] <= worst[prompt]


def test_the_run_verifies_and_its_page_says_whose_answers_they_are(rounds):
    run, made = rounds
    assert verify(run).rounds == 3
    assert "answers of the head and the start policy" in round_page(1, made[0])
