"""The decide step: what counts as evidence, and what it makes of planted rounds."""

import json
from pathlib import Path

import numpy as np
import pytest
import tinyrun
from golden.table import numbers_from_hashes

from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import StoreError
from tasks.deciding import decide_on_round
from tasks.measuring import measure_features


def test_held_out_pairs_of_one_prompt_count_as_one(tmp_path):
    asked = [{"role": "user", "content": f"Question {n}?"} for n in range(2)]
    heldout = [pair | {"prompt": [asked[n % 2]]} for n, pair in enumerate(tinyrun.pairs(12, seed=7))]
    path = tinyrun.write_rows(tmp_path / "heldout.jsonl", heldout)
    for least, refused in ((3, True), (2, False)):
        config = tinyrun.config(
            tmp_path,
            data={"heldout": [{"path": str(path)}], "on_overlap": "drop"},
            decide={"min_pairs": least},
            limits={"rounds": 2},
        )
        with numbers_from_hashes():
            records = tinyrun.work(config, tmp_path / f"store-{least}")
        decided = (
            Artifact(records.store, records.rounds()[1].steps["decision"]).path("decision.json").read_text()
        )
        assert ("is measured on held-out pairs of 2 prompts" in decided) is refused
        assert ('"not_enough_evidence"' in decided) >= refused


class Planted:
    """A run whose held-out margins are given; in `longer` pairs the longer answer is chosen.

    Without others the human pairs are eight of the held-out ones, all kept in every round.
    """

    def __init__(self, folder, longer, shorter, train=None, kept=None, **decide):
        self.store = open_store(str(folder / "store"))
        self.config = tinyrun.config(folder, decide={"min_pairs": 30, **decide})
        self.rows = [self._row(n, *((4, 2) if n < longer else (2, 4))) for n in range(longer + shorter)]
        self.train = (
            self.rows[:8] if train is None else [self._row(n, *sizes) for n, sizes in enumerate(train)]
        )
        self.rendered = self.put("render", self._rendered)
        features = steps.features(self.config, self.rendered, None)
        self.features = run_step(self.store, features, measure_features, ExecutionConfig()).ref
        margins = [0.5 + n / 100 for n in range(len(self.train))]
        self.scored = self.put("review", self._scored("scored", self.train, margins))
        self.human = self.put("select", self._ledger(kept or [True] * len(self.train)))
        self.promoted, self.history = {}, []

    def put(self, step, work, **fields):
        spec = StepSpec(step=step, version=1, fields=fields, inputs={})
        return run_step(self.store, spec, work, ExecutionConfig()).ref

    def _row(self, number, chosen, rejected):
        turns = {"prompt": ("user", 3), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
        row = {"pair_id": f"{number:016x}", "prompt_id": str(number), "origin": "human", "prompt_ids": [1]}
        for name, (role, words) in turns.items():
            text = " ".join([f"{name}{number}"] * words)
            row |= {name: [{"role": role, "content": text}], f"{name}_ids": list(range(words))}
        return row

    def _rendered(self, attempt):
        for side, rows in (("train", self.train), ("heldout", self.rows), ("test", [])):
            schema.write_table(schema.from_rows(schema.PAIRS, rows), attempt.write(f"{side}.parquet"))
        return ["train.parquet", "heldout.parquet", "test.parquet"]

    def _scored(self, name, rows, margins):
        def work(attempt):
            scored = [
                {"pair_id": row["pair_id"], "margin": margin, "ensemble_margin": margin}
                for row, margin in zip(rows, margins, strict=True)
            ]
            schema.write_table(schema.from_rows(schema.SCORED, scored), attempt.write(f"{name}.parquet"))
            rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": len(rows), "groups": len(rows)}
            attempt.metrics |= {"heldout/rewards/accuracies": rate, "heldout/accuracy_change": rate}
            return [f"{name}.parquet"]

        return work

    def _ledger(self, kept):
        def work(attempt):
            rows = [{"pair_id": r["pair_id"], "kept": k} for r, k in zip(self.train, kept, strict=True)]
            schema.write_table(schema.from_rows(schema.LEDGER, rows), attempt.write("ledger.parquet"))
            return ["ledger.parquet"]

        return work

    def decide(self, margins, rows=None, answer=None, **changes):
        """Decide about the next round, whose held-out margins are these; returns the record's metrics."""
        number = len(self.history)
        work = self._scored("heldout", self.rows if rows is None else rows, list(map(float, margins)))
        evidence = self.put("evaluate", work, round=number)
        inputs = {"evidence": evidence, "scored": self.scored, "human": self.human}
        inputs |= {"rendered": self.rendered, "features": self.features}
        if self.promoted:
            inputs |= {f"promoted-{n:03d}": ref for n, ref in self.promoted.items()}
            inputs |= {"head_scored": self.scored, "head_human": self.human}
        limits = self.config.limits.model_copy(update=changes)
        config = self.config.model_copy(update={"limits": limits})
        spec = steps.decide(config, number, self.history, answer, inputs)
        record = run_step(self.store, spec, decide_on_round, ExecutionConfig())
        found = record.metrics
        self.file = json.loads(Artifact(self.store, record.ref).path("decision.json").read_text())
        if found["decision"] == "promote":
            self.promoted[number] = evidence
        entry = {"round": number, "decision": found["decision"], "head": found["head_after"]}
        self.history.append(entry)
        return found


def ranked(right, of):
    """Margins of `of` pairs, the first `right` of them above 0."""
    return [1.0] * right + [-1.0] * (of - right)


LONGER, SHORTER = 600, 200


@pytest.mark.parametrize(
    ("metric", "decision", "verdict", "quantity"),
    [
        ("balanced", "promote", "improving", "balanced"),
        ("worst-side", "promote", "improving", "worst_side"),
        ("accuracy", "hold", "degrading", "accuracy"),
    ],
)
def test_a_round_that_relies_less_on_length_is_promoted_unless_accuracy_decides(
    tmp_path, metric, decision, verdict, quantity
):
    """Labels that favour length three to one. Where the better answer is longer and where it is shorter:

    round 0: 540/600 and 80/200    accuracy .775   balanced (.90 + .40)/2 = .650   reliance  .50
    round 1: 432/600 and 140/200   accuracy .715   balanced (.72 + .70)/2 = .710   reliance  .02
    """
    run = Planted(tmp_path, LONGER, SHORTER, metric=metric)
    run.decide(ranked(540, LONGER) + ranked(80, SHORTER))
    found = run.decide(ranked(432, LONGER) + ranked(140, SHORTER))
    assert (found["decision"], found["verdict"], found["score_metric"]) == (decision, verdict, quantity)
    value = {"balanced": 0.71, "worst-side": 0.70, "accuracy": 0.715}[metric]
    assert found["score"]["value"] == pytest.approx(value)
    assert run.file["verdict"]["reason"] in found["reason"]
    change = run.file["changes"]["tokens"]
    assert change["reliance"]["0"]["value"] == pytest.approx(-0.48)
    assert change["balanced"]["0"]["value"] == pytest.approx(0.06)
    assert change["reliance"]["0"]["high"] < 0 < change["balanced"]["0"]["low"]
    assert found["best_round"] == (0 if metric == "accuracy" else 1)


def decline(run):
    """Accuracies 0.517, 0.450, 0.400 on 60 pairs, as the demo's: round 1 gains two pairs and loses six."""
    first = ranked(31, 60)
    second = [*ranked(25, 31), *([1.0] * 2 + [-1.0] * 27)]
    third = ranked(24, 60)
    return [(np.sign(margins) > 0).mean().round(3) for margins in (first, second, third)], (
        first,
        second,
        third,
    )


@pytest.mark.parametrize(("patience", "last"), [(1, "hold"), (0, "roll_back")])
def test_a_slow_decline_is_held_or_rolled_back_to_round_0(tmp_path, patience, last):
    run = Planted(tmp_path, 30, 30, metric="accuracy")
    accuracies, rounds = decline(run)
    assert accuracies == [0.517, 0.450, 0.400]
    found = [run.decide(margins, patience=patience) for margins in rounds]
    assert [round["decision"] for round in found] == ["promote", "promote", last]
    assert found[2]["verdict"] == "degrading" and "against round 0 by -0.117" in found[2]["reason"]
    assert found[2]["best_round"] == 0
    assert found[2]["head_after"] == (1 if last == "hold" else 0)


@pytest.mark.parametrize(("pairs", "verdicts", "stop"), [
    (60, ["not_enough_evidence"] * 3, None),
    (400, ["not_enough_evidence", "not_enough_evidence", "converged"], "converged"),
])  # fmt: skip
@pytest.mark.parametrize("metric", ["balanced", "accuracy"])
def test_convergence_is_shown_over_two_heads_and_with_power_or_not_claimed(
    tmp_path, pairs, verdicts, stop, metric
):
    """Nothing changes at all; of 60 pairs three may still (the rule of three), which is 0.05 a round."""
    run = Planted(tmp_path, pairs // 2, pairs // 2, metric=metric)
    margins = ranked(pairs // 4, pairs // 2) * 2
    found = [run.decide(margins) for _ in range(3)]
    assert [round["verdict"] for round in found] == verdicts
    assert found[-1]["decision"] == "promote" and found[-1]["stop_reason"] == stop


def test_with_few_pairs_on_a_side_accuracy_decides_and_the_reason_says_so(tmp_path):
    for shorter, quantity in ((9, "accuracy"), (10, "balanced")):
        run = Planted(tmp_path / str(shorter), 60, shorter)
        run.decide(ranked(40, 60 + shorter))
        found = run.decide(ranked(40, 60 + shorter))
        assert found["score_metric"] == quantity
        assert ("(a side has too few pairs for balanced)" in found["reason"]) is (quantity == "accuracy")


def test_a_policy_without_finite_margins_is_held_not_promoted_for_lack_of_evidence(tmp_path):
    run = Planted(tmp_path, 40, 40)
    run.decide(ranked(30, 40) * 2)
    found = run.decide([np.nan] * 80)
    assert (found["decision"], found["verdict"], found["score"]["value"]) == ("hold", "degrading", 0.0)


def test_pairs_that_a_promoted_round_could_not_score_are_left_out_of_the_comparison_and_counted(tmp_path):
    run = Planted(tmp_path, 40, 40, metric="accuracy")
    run.decide([np.nan] * 5 + ranked(35, 75))
    found = run.decide(ranked(40, 80))
    assert run.file["pairs"] == {"compared": 75, "left_out": 5}
    assert found["score"] | {"n": 75} == found["score"] and found["score"]["value"] == round(35 / 75, 6)


def test_the_best_round_is_the_earlier_of_two_that_are_alike_and_is_reported_by_the_other_half(tmp_path):
    run = Planted(tmp_path, 40, 40, metric="accuracy")
    margins = ranked(30, 40) * 2
    run.decide(margins)
    found = run.decide(margins)
    assert found["best_round"] == 0 and found["head_after"] == 1
    best = run.file["best"]
    assert best["score"]["pairs"] == 40  # the half that did not choose
    assert best["sentence"] == found["best_reason"]


def test_a_reviewer_s_roll_back_goes_to_the_best_round(tmp_path):
    run = Planted(tmp_path, 40, 40)
    run.decide(ranked(36, 40) * 2)
    run.decide(ranked(35, 40) * 2)
    found = run.decide(ranked(36, 40) * 2, answer={"decision": "roll_back", "note": "", "who": "me"})
    assert (found["decision"], found["head_after"]) == ("roll_back", 0)


def test_rounds_with_other_held_out_pairs_are_not_compared(tmp_path):
    run = Planted(tmp_path, 40, 40)
    run.decide(ranked(40, 80))
    with pytest.raises(StoreError, match="cannot be compared"):
        run.decide(ranked(40, 80), rows=run.rows[::-1])


@pytest.mark.parametrize(("on_alarm", "decision"), [("record", "promote"), ("hold", "hold")])
def test_the_alarm_is_raised_for_the_features_that_training_amplified(tmp_path, on_alarm, decision):
    """All 40 kept pairs have the longer answer chosen, half of all 80.

    Counter accuracy falls from 40/40 to 20/40, aligned accuracy rises likewise, and over all pairs it stands.
    """
    train = [(4, 2)] * 40 + [(2, 4)] * 40
    kept = [True] * 40 + [False] * 40
    run = Planted(tmp_path, 40, 40, train=train, kept=kept, on_alarm=on_alarm)
    run.decide(ranked(20, 40) + ranked(40, 40))
    found = run.decide(ranked(40, 40) + ranked(20, 40))
    assert found["alarm"] == "amplified" and found["decision"] == decision
    assert run.file["alarm"]["raised"] == ["tokens", "characters", "words"]
    assert "features amplified against the last head: tokens (" in found["alarm_reason"]


def test_nothing_is_amplified_where_the_selection_favours_no_feature(tmp_path):
    train = [(4, 2), (2, 4)] * 40
    run = Planted(tmp_path, 40, 40, train=train, kept=[True, True, False, False] * 20)
    run.decide(ranked(20, 40) + ranked(40, 40))
    found = run.decide(ranked(40, 40) + ranked(20, 40))
    assert found["alarm"] == "not_amplified" and run.file["alarm"]["raised"] == []


# ----------------------------------------------------------------------------- what the history makes of it


def rounds_of(*told):
    """Manifests with these decisions, heads and best rounds: copies of a kept store's first round."""
    store = open_store(str(Path(__file__).parents[1] / "fixtures" / "store-format-1"))
    first = RunStore(store, "first").rounds()[0]
    return [
        first.model_copy(
            update={
                "round": number,
                "decision": decision,
                "accuracy": accuracy,
                "metrics": first.metrics | ({} if best is None else {"best_round": best, "head_after": head}),
            }
        )
        for number, (decision, accuracy, head, best) in enumerate(told)
    ]


def test_head_and_best_round_are_those_that_the_decisions_recorded():
    """Accuracies say round 1; the metric said round 0, and the roll-back went there."""
    told = [("promote", 0.5, 0, 0), ("promote", 0.6, 1, 0), ("roll_back", 0.1, 0, 0)]
    history = History(rounds_of(*told))
    assert history.best.round == 0 and history.head.round == 0
    assert [entry["head"] for entry in history.entries()] == [0, 1, 0]
    older = History(rounds_of(*((decision, accuracy, None, None) for decision, accuracy, *_ in told)))
    assert older.best.round == 1 and older.head.round == 1


def test_a_recorded_best_round_that_was_not_promoted_is_refused():
    with pytest.raises(StoreError, match="name round 1 as best_round"):
        _ = History(rounds_of(("promote", 0.5, 0, 0), ("hold", 0.6, 0, 1))).best
