"""`column:<name>` in the panel: a number of the user's own for each answer, from the data to the evidence."""

import numpy as np
import pytest
import tinyrun

from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepRef

PANEL = {"panel": ["tokens", "words", "column:score"], "feature": "column:score"}


def rows(count=32):
    """Pairs with a score for each answer: the chosen one is better in two of three."""
    return [
        pair | {"score_chosen": (n % 3 > 0) + n / 100, "score_rejected": 0.5 + n / 100}
        for n, pair in enumerate(tinyrun.pairs(count))
    ]


def config(folder, **data):
    """One round on these pairs, half of them held out, with the column in the panel."""
    path = tinyrun.write_rows(folder / "scored.jsonl", rows())
    source = {"train": [{"path": str(path)}], "heldout_fraction": 0.5, **data}
    decide = PANEL | {"min_pairs": 4}
    return tinyrun.config(folder, data=source, decide=decide, limits={"rounds": 1})


def measured(features, side):
    """The column by pair, as the features step wrote it."""
    return {row["pair_id"]: row["column:score"] for row in schema.iter_rows(features.path(f"{side}.parquet"))}


@pytest.mark.parametrize("flipped", [0.0, 0.5])
def test_a_column_divides_the_held_out_pairs_and_is_in_the_evidence(tmp_path, flipped):
    """Also where labels are flipped: the values belong to the answers, not to the sides."""
    extra = {"flip_fraction": flipped} if flipped else {}
    records = tinyrun.work(config(tmp_path, **extra), tmp_path / "store")
    round = records.rounds()[0]
    made = {role: Artifact(records.store, ref) for role, ref in round.steps.items()}
    features = Artifact(records.store, made["evidence"].record.inputs["features"])
    score = {}
    for row in rows():
        for side in ("chosen", "rejected"):
            score[row["prompt"][0]["content"], row[side][0]["content"]] = row[f"score_{side}"]
    for side in ("train", "heldout"):
        pairs = list(schema.iter_rows(made["pairs"].path(f"{side}.parquet")))
        found = measured(features, side)
        assert len(pairs) == len(found) == 16
        for pair in pairs:
            answers = [pair[name][0]["content"] for name in ("chosen", "rejected")]
            chosen, rejected = (score[pair["prompt"][0]["content"], answer] for answer in answers)
            assert found[pair["pair_id"]] == pytest.approx(chosen - rejected)
    by_sign = {1: [], -1: []}
    heldout = measured(features, "heldout")
    for row in schema.iter_rows(made["evidence"].path("heldout.parquet")):
        by_sign[int(np.sign(heldout[row["pair_id"]]))].append(row["margin"] > 0)
    reliance = np.mean(by_sign[1]) - np.mean(by_sign[-1])
    told = round.metrics["heldout/reliance/column:score/reliance"]
    assert told["value"] == pytest.approx(reliance, abs=1e-6)
    if flipped:
        assert made["mixture"].record.metrics["flipped"] == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score_chosen": None}, "1 of 32 chosen values are missing or no finite number"),
        ({"score_rejected": "good"}, "1 of 32 rejected values are missing"),
        ("constant", "both answers have the same value in all 32 pairs"),
        ("absent", "32 of 32 chosen values are missing"),
    ],
)
def test_a_column_that_says_nothing_is_refused_before_any_model_is_loaded(tmp_path, sera, change, said):
    data = rows()
    if change == "constant":
        data = [row | {"score_chosen": 1, "score_rejected": 1} for row in data]
    elif change == "absent":
        data = tinyrun.pairs(32)
    else:
        data[4] |= change
    path = tinyrun.write_rows(tmp_path / "scored.jsonl", data)
    experiment = tinyrun.experiment(tmp_path, data={"train": [{"path": str(path)}]}, decide=PANEL)
    found = sera("run", experiment, "--store", tmp_path / "store", code=2)
    assert said in found.err and "column:score (read from score_chosen and score_rejected)" in found.err
    assert not list((tmp_path / "store").glob("steps/model/*/done.json"))


def test_runs_without_a_column_keep_their_keys(tmp_path):
    """What a column adds to the keys is absent without one."""
    plain, with_column = tinyrun.config(tmp_path), config(tmp_path)
    ref = StepRef(step="data", key="k", digest="d")
    for settings, values, inputs in (
        (plain, None, {"rendered"}),
        (with_column, ["score"], {"rendered", "data"}),
    ):
        digests = {"train": ["0"], "heldout": [], "test": [], "prompts": []}
        assert steps.data(settings, digests).fields.get("values") == values
        assert set(steps.features(settings, ref, ref).inputs) == inputs
    assert "panel" not in plain.result_fields()["decide"]
