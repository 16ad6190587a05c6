"""Cross-fitting: a pair is reviewed by a policy that was not trained on it, through three rounds."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tinyrun
import trainable
from pydantic import ValidationError

from flows import round as sera_round
from flows.planning.plan import plan
from flows.round import Past, Sides
from flows.running.open_run import resolved
from flows.store_tools import verify as verifying
from flows.store_tools.garbage import UNNEEDED, collect
from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepRef, find_record
from sera_core.artifacts.store import open_store
from sera_core.data.folds import Fold, fold_of
from sera_core.errors import InputError, StoreError
from sera_core.models.policies import load_policy
from tasks.engines.training_data import fold_order, training_order

SETTINGS = {
    "review": {"crossfit": 2},
    "train": {"learning_rate": 1e-3, "batch": 6},
    "mix": {"shares": [0.5, 0.0]},
    "evaluate": {"prompts": 0},
    "decide": {"min_pairs": 4, "min_effect": 0.9},  # every round is promoted, as a plan assumes
}


class Killed(Exception):
    """The process ends here."""


def killed_in_a_fold(work):
    """`do_work` that ends in the second optimizer step of the second fold policy of round 0."""

    def do_work(store, spec, execution, progress):
        calls = []

        def report(*told):
            calls.append(told)
            fold = spec.fields.get("fold", {}).get("out")
            if (spec.step, spec.fields.get("round"), fold, len(calls)) == ("train", 0, 1, 2):
                raise Killed
            progress(*told)

        return work(store, spec, execution, report)

    return do_work


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Three rounds, interrupted in a fold policy's training and resumed; the plan from before, and a copy of
    the store without that training."""
    folder = tmp_path_factory.mktemp("crossfit")
    config = tinyrun.config(folder, **SETTINGS)
    before = plan(config, "tiny", str(folder / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyrun, "do_work", killed_in_a_fold(tinyrun.do_work))
        with pytest.raises(Killed):
            tinyrun.work(config, folder / "store")
    parts = (folder / "store").glob("steps/train/*/part-*.json")
    (part,) = [part for part in parts if not (part.parent / "done.json").exists()]
    shutil.copytree(folder / "store", folder / "other", ignore=shutil.ignore_patterns(part.parent.name))
    records = tinyrun.work(config, folder / "store")
    resumed = find_record(records.store, "train", part.parent.name)
    return SimpleNamespace(folder=folder, config=config, plan=before, records=records, resumed=resumed)


def scored(fitted, round):
    return Artifact(fitted.records.store, fitted.records.rounds()[round].steps["scored"])


def input_of(artifact, name):
    return Artifact(artifact.store, artifact.record.inputs[name])


def fold_trainings(fitted):
    """(record, mixture's rows) of every fold policy."""
    store = fitted.records.store
    for path in sorted((fitted.folder / "store").glob("steps/train/*/done.json")):
        record = find_record(store, "train", path.parent.name)
        if "fold" in record.fields:
            mixture = Artifact(store, record.inputs["mixture"]).path("mixture.parquet")
            yield Artifact(store, record.ref), list(schema.iter_rows(mixture))


def tokens_of(row):
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


# ---------------------------------------------------------------------------------------- three rounds


@pytest.mark.slow
def test_no_fold_policy_trains_on_a_pair_of_its_fold_and_all_together_as_long_as_the_round(fitted):
    origins = Counter()
    found = list(fold_trainings(fitted))
    assert sorted((t.record.fields["round"], t.record.fields["fold"]["out"]) for t, _ in found) == [
        *((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    for training, rows in found:
        fold, number = fold_of(training.record.fields), training.record.fields["round"]
        outside = [n for n, row in enumerate(rows) if not fold.holds(row["prompt"])]
        assert 0 < len(outside) < len(rows)
        tokens = [tokens_of(row) for row in rows]
        order = fold_order(tokens, outside, 2, 6, 1, (0, number))
        assert set(order) <= set(outside)
        lines = [json.loads(line) for line in training.path("log.jsonl").read_text().splitlines()]
        trained = np.cumsum([tokens[row] for row in order])[[*range(5, len(order), 6), -1][: len(lines)]]
        assert [line["tokens/trained"] for line in lines] == trained.tolist()  # the rows trained on
        assert sum(line["pairs"] for line in lines) == len(order)
        assert lines[-2]["tokens/trained"] < sum(tokens) / 2 <= lines[-1]["tokens/trained"]
        assert training.record.metrics["tokens/trained_folds"] == lines[-1]["tokens/trained"]
        origins.update(rows[n]["origin"] for n in outside)
    assert set(origins) == {"human", "generated"}


@pytest.mark.slow
@pytest.mark.parametrize("round", [1, 2])
def test_a_pair_has_the_log_probabilities_of_its_folds_policy(fitted, round):
    """Computed a second way: one plain forward pass of each response under the policy of its pair's fold."""
    review = scored(fitted, round)
    rows = {row["pair_id"]: row for row in schema.iter_rows(review.path("scored.parquet"))}
    pairs = list(schema.iter_rows(input_of(review, "pairs").path("train.parquet")))
    assert list(rows) == [pair["pair_id"] for pair in pairs]
    for fold in fitted.config.folds:
        scores = input_of(review, f"policy-000-fold-{fold.out:03d}")
        trained = input_of(scores, "policy")
        assert (trained.record.fields["round"], fold_of(trained.record.fields)) == (round - 1, fold)
        policy = load_policy(trained.folder("policy"), "float32")
        own = [pair for pair in pairs if fold.holds(pair["prompt"])]
        assert scores.record.counts["responses"] == 2 * len(own)
        for pair in own[:4]:
            for side in ("chosen", "rejected"):
                value = trainable.logps(policy, pair["prompt_ids"], pair[f"{side}_ids"])
                assert rows[pair["pair_id"]][f"policy_{side}_logps"] == pytest.approx(value, abs=1e-3)


@pytest.mark.slow
def test_the_ensemble_has_fold_policies_for_past_heads_too_and_one_scoring_of_the_file_for_each(fitted):
    now, before = (list(schema.iter_rows(scored(fitted, n).path("scored.parquet"))) for n in (2, 1))
    for late, early in zip(now, before, strict=True):
        assert late["ensemble_margin"] == pytest.approx(
            0.7 * late["margin"] + 0.3 * early["margin"], abs=1e-5
        )
    names = [name for name in scored(fitted, 2).record.inputs if name.startswith("policy-")]
    counts = Counter(
        {name: input_of(scored(fitted, 2), name).record.counts["responses"] for name in sorted(names)}
    )
    assert len(counts) == 4 and counts.total() == 2 * 2 * len(now)


@pytest.mark.slow
def test_the_noise_is_that_of_the_values_used(fitted):
    """All folds' probes together are the rows of the reference's probe, each under its fold's policy."""
    review = scored(fitted, 1)
    expected = [
        row["id"] for row in schema.iter_rows(input_of(review, "exact-ref-000").path("logps.parquet"))
    ]
    found = {}
    for fold in fitted.config.folds:
        probe = input_of(review, f"exact-policy-000-fold-{fold.out:03d}")
        same = input_of(review, f"policy-000-fold-{fold.out:03d}").record.inputs["policy"]
        assert probe.record.inputs["policy"] == same
        found |= {row["id"]: row["logps"] for row in schema.iter_rows(probe.path("logps.parquet"))}
    assert sorted(found) == sorted(expected) and len(found) == 12
    rows = {row["pair_id"]: row for row in schema.iter_rows(review.path("scored.parquet"))}
    for id, value in found.items():
        pair, side = id.split("/")
        assert rows[pair][f"policy_{side}_logps"] == pytest.approx(value, abs=1e-3)
    assert 0 < review.record.metrics["margin_noise_nats"] < 1e-3


@pytest.mark.slow
def test_the_memory_in_the_heads_margins_is_measured_on_the_pairs_it_was_trained_on(fitted):
    rounds = fitted.records.rounds()
    for number in (1, 2):
        review, metrics = scored(fitted, number), rounds[number].metrics
        before = Artifact(review.store, rounds[number - 1].steps["mixture"]).path("mixture.parquet")
        trained = {row["pair_id"] for row in schema.iter_rows(before) if row["origin"] == "human"}
        margins = [
            row["margin"]
            for row in schema.iter_rows(review.path("scored.parquet"))
            if row["pair_id"] in trained
        ]
        assert metrics["review/pairs"] == len(trained) == len(margins)
        assert metrics["review/crossfit_mean"] == pytest.approx(np.mean(margins), abs=1e-5)
        assert metrics["review/head_mean"] > metrics["review/crossfit_mean"]
        evidence = Artifact(review.store, rounds[number - 1].steps["evidence"]).record.metrics
        assert metrics["review/head_mean"] == pytest.approx(evidence["trained/margin"]["value"], abs=1e-4)
        page = Artifact(review.store, rounds[number].steps["report"]).path("report.html").read_text()
        assert "under the fold policies, which were not trained on them" in page
    assert "review/pairs" not in rounds[0].metrics


@pytest.mark.slow
def test_the_plan_before_is_what_is_done_after(fitted):
    done = Counter(path.parent.parent.name for path in (fitted.folder / "store").glob("steps/*/*/done.json"))
    assert Counter(row["step"] for row in fitted.plan["steps"]) == done
    again = plan(fitted.config, "tiny", str(fitted.folder / "store"))
    assert again["reuse"] == sum(done.values()) and again["run_now"] == again["depends"] == 0


@pytest.mark.slow
def test_an_interrupted_fold_policy_is_resumed_to_the_same_bytes(fitted):
    whole = tinyrun.do_work(str(fitted.folder / "other"), fitted.resumed.spec, fitted.config.execution)
    assert (whole.digest, whole.metrics) == (fitted.resumed.digest, fitted.resumed.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["store", "other"], ids=["finished", "open"])
def test_gc_keeps_the_fold_policies_of_a_run_that_is_finished_or_open(fitted, store):
    """In the open one the first fold policy is done and no manifest names it yet."""
    found = collect(open_store(str(fitted.folder / store)), delete=False, older_than=0)
    assert not [item for item in found["items"] if item["why"] == UNNEEDED]
    steps_done = len(list((fitted.folder / store).glob("steps/*/*/done.json")))
    assert found["steps_kept"] == steps_done


@pytest.mark.slow
def test_the_plan_estimates_folds_as_a_part_of_their_round(fitted):
    tokens = {
        number: [
            row["tokens"] for row in fitted.plan["steps"] if (row["step"], row["round"]) == ("train", number)
        ]
        for number in range(3)
    }
    (whole,) = tokens[0]
    assert tokens[1][:2] == [whole // 2] * 2 and tokens[2][:2] == [tokens[1][2] // 2] * 2
    assert len(tokens[2]) == 3


@pytest.mark.slow
def test_a_run_verifies_and_scores_of_another_fold_do_not(fitted, monkeypatch):
    verifying.verify(fitted.records)
    real = verifying.find_record

    def swapped(store, step, key):
        record = real(store, step, key)
        if step == "train" and record.fields.get("fold", {}).get("out") == 0:
            fields = {**record.fields, "fold": {**record.fields["fold"], "out": 1}}
            return record.model_copy(update={"fields": fields})
        return record

    monkeypatch.setattr(verifying, "find_record", swapped)
    with pytest.raises(StoreError, match="policy-000-fold-000: not scored by a policy of its fold"):
        verifying.verify(fitted.records)


# ---------------------------------------------------------------------------------------- wiring


def ref(name):
    return StepRef(step="any", key=name, digest=name)


@pytest.mark.parametrize("start", ["previous", "reference"])
def test_a_fold_policy_starts_from_its_own_past_where_the_head_started_from_the_head(tmp_path, start):
    """Else it would start from a policy that was trained on the pairs of its fold."""
    config = tinyrun.config(tmp_path, review={"crossfit": 2}, train={"start": start})
    made = {}

    def do(spec):
        made[spec.key] = spec
        return StepRef(step=spec.step, key=spec.key, digest=spec.key)

    heads = [{"policy": ref(f"head-{n}"), "mixture": ref(f"mixture-{n}")} for n in (0, 3)]
    past = Past(heads, rounds=[0, 3])
    sides = Sides(ref("data"), ref("model"), ref("pairs"), ref("features"))
    (first, early), (second, late) = sera_round.fold_policies(config, sides, past, do)
    assert (first, second) == (ref("head-0"), ref("head-3"))
    for fold, (one, two) in enumerate(zip(early, late, strict=True)):
        assert made[one.key].inputs["start"] == ref("model") and made[one.key].fields["start_is_reference"]
        assert made[two.key].inputs["start"] == (one if start == "previous" else ref("model"))
        assert made[two.key].fields["start_is_reference"] == (start == "reference")
        assert made[two.key].inputs["mixture"] == ref("mixture-3") and made[two.key].fields["round"] == 3
        assert made[two.key].fields["fold"] == {"of": 2, "out": fold, "seed": 0}


def test_a_fold_trains_for_its_part_of_the_tokens_on_the_other_rows():
    """Rows of 10, 20, 30 and 40 tokens, row 1 in the fold; one epoch is 100 tokens, so 50: 10 + 30 + 40."""
    assert fold_order([10, 20, 30, 40], [0, 2, 3], 2, 1, 1, (0, 0)) == [0, 2, 3]
    assert fold_order([10, 20, 30, 40], [0, 2, 3], 5, 1, 1, (0, 0)) == [0, 2]  # 20 tokens
    twice = fold_order([10, 20, 30, 40], [0, 2, 3], 2, 1, 2, (0, 0))  # 100 tokens: a second, shuffled pass
    again = training_order([10, 30, 40], 1, 1, (0, 0), 100)
    assert twice == [[0, 2, 3][row] for row in again] and twice[:3] == [0, 2, 3] and len(twice) > 3
    assert fold_order([10, 20, 30, 40], [0, 2, 3], 2, 1, 1, (0, 0), budget=35) == [0, 2]  # 60 reach 35: 30
    assert fold_order([10, 20], [], 2, 1, 1, (0, 0)) == []


def test_without_it_step_and_configuration_are_those_of_older_versions(tmp_path):
    plain, folds = tinyrun.config(tmp_path), tinyrun.config(tmp_path, review={"crossfit": 2})
    digests = {"data": {side: [] for side in steps.SIDES}, "model": "m"}
    assert "crossfit" not in resolved(plain, digests)["review"]
    assert resolved(folds, digests)["review"]["crossfit"] == 2
    given = (ref("start"), ref("model"), ref("mixture"), True)
    one, other = steps.train(plain, 0, *given), steps.train(folds, 0, *given, fold=Fold(2, 1, 0))
    assert "fold" not in one.fields and other.fields == {**one.fields, "fold": {"of": 2, "out": 1, "seed": 0}}


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("folds", [1, -1])
def test_a_single_fold_is_refused(tmp_path, folds):
    with pytest.raises(ValidationError, match=r"give 0 \(off\), or 2 or more folds"):
        tinyrun.config(tmp_path, review={"crossfit": folds})


def test_more_folds_than_prompts_are_refused_before_any_model_is_loaded(tmp_path, sera):
    experiment, store = tinyrun.experiment(tmp_path, review={"crossfit": 25}), tmp_path / "store"
    for command in ("run", "plan"):
        told = sera(command, experiment, "--store", store, code=2).err
        assert "review.crossfit = 25: the 24 train pairs of the data have 24 different prompts" in told
        assert told.strip().count("\n") == 0
    assert not (store / "steps" / "model").exists()


def test_a_mixture_within_one_fold_is_refused_with_its_size(tmp_path):
    bench = trainable.Bench(tmp_path, pairs=3)
    fold = next(fold for fold in Fold.every(2, 0) if fold.holds([{"role": "user", "content": "same"}]))
    for row in bench.rows:
        row["prompt"] = [{"role": "user", "content": "same"}]
    spec = bench.spec(bench.mixture(), trainable.TrainConfig(), fold={"of": 2, "out": fold.out, "seed": 0})
    with pytest.raises(InputError, match=rf"all 3 pairs of round 0 have prompts of fold {fold.out + 1}"):
        bench.run(spec)
