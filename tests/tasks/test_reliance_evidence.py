"""What the steps record of a feature: measured from the pairs' texts, then held against the margins."""

import json

import numpy as np
import pytest
import tinyrun

from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.data.differences import read_differences
from sera_core.errors import InputError, StoreError
from sera_core.extensions import source_hash
from sera_core.reporting import evidence
from tasks.evaluating import test_policy as evaluate_test_side
from tasks.measuring import measure_features

LONGER, SHORTER, EQUAL = 30, 10, 4


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def pair(number, prompt, chosen, rejected):
    """A rendered pair; a token a word."""
    answers = {"chosen": chosen, "rejected": rejected}
    texts = {name: [message("assistant", text)] for name, text in answers.items()}
    ids = {f"{name}_ids": list(range(len(text.split()))) for name, text in answers.items()}
    return {"pair_id": f"{number:016x}", "prompt_id": f"p{number}", "origin": "human"} | {
        "prompt": prompt, "prompt_ids": [1], **texts, **ids
    }  # fmt: skip


def biased_pairs():
    """In 30 the better answer is the longer one, in 10 the shorter one, in 4 both are as long."""
    lengths = [(3, 1)] * LONGER + [(1, 3)] * SHORTER + [(2, 2)] * EQUAL
    rows = []
    for n, (chosen, rejected) in enumerate(lengths):
        asked = [message("user", f"question {n}")]
        rows.append(pair(n, asked, " ".join(["better"] * chosen), " ".join(["worse"] * rejected)))
    return rows


class Bench:
    """Rendered pairs, and log-probabilities that give them chosen margins."""

    def __init__(self, folder, rows, **decide):
        self.store = open_store(str(folder / "store"))
        self.rows, self.config = rows, tinyrun.config(folder, decide=decide)
        self.rendered = self.put("render", self._rendered)

    def put(self, step, work, number=0):
        spec = StepSpec(step=step, version=1, fields={"n": number}, inputs={})
        return run_step(self.store, spec, work, ExecutionConfig()).ref

    def _rendered(self, attempt):
        for side in ("train", "heldout", "test"):
            table = schema.from_rows(schema.PAIRS, self.rows if side == "test" else self.rows[:1])
            schema.write_table(table, attempt.write(f"{side}.parquet"))
        return ["train.parquet", "heldout.parquet", "test.parquet"]

    def features(self):
        spec = steps.features(self.config, self.rendered, None)
        return run_step(self.store, spec, measure_features, ExecutionConfig()).ref

    def differences(self):
        ids = [row["pair_id"] for row in self.rows]
        return read_differences(Artifact(self.store, self.features()).path("test.parquet"), ids)

    def logps(self, values, number):
        """One value a response, chosen and rejected in turn."""

        def work(attempt):
            ids = [f"{row['pair_id']}/{side}" for row in self.rows for side in ("chosen", "rejected")]
            tokens = [len(row[f"{side}_ids"]) for row in self.rows for side in ("chosen", "rejected")]
            columns = {"id": ids, "logps": values, "tokens": tokens}
            schema.write_table(schema.table(schema.LOGPS, columns), attempt.write("logps.parquet"))
            return ["logps.parquet"]

        return self.put("logps", work, number)

    def evidence(self, margins):
        """The record of the test side's evidence under a policy with these margins, in nats."""
        policy = np.stack([margins, np.zeros(len(margins))], axis=1).ravel()
        inputs = {
            "rendered": self.rendered,
            "features": self.features(),
            "policy_test": self.logps(policy, 1),
            "reference_test": self.logps(np.zeros(len(policy)), 2),
        }
        return run_step(self.store, steps.test(self.config, inputs), evaluate_test_side, ExecutionConfig())


def test_a_policy_that_goes_by_length_alone_has_full_reliance_and_half_the_balanced_accuracy(tmp_path):
    """Margins are the difference in tokens: right on 30 longer ones, wrong on 10, a tie on 4 equal ones.

    accuracy = (30 + 4/2)/44 = 0.73, yet reliance = 1 − 0 and balanced = (1 + 0)/2.
    """
    bench = Bench(tmp_path, biased_pairs())
    tokens = bench.differences()["tokens"]
    metrics = bench.evidence(tokens).metrics
    value = {
        name: metrics[f"test/reliance/tokens/{name}"]
        for name in ("reliance", "balanced", "worst_side", "aligned", "counter", "equal", "correlation")
    }
    assert {name: rate["value"] for name, rate in value.items()} == {
        "reliance": 1.0, "balanced": 0.5, "worst_side": 0.0,
        "aligned": 1.0, "counter": 0.0, "equal": 0.5, "correlation": 1.0,
    }  # fmt: skip
    assert [value[side]["n"] for side in ("aligned", "counter", "equal")] == [LONGER, SHORTER, EQUAL]
    assert value["balanced"]["n"] == value["balanced"]["groups"] == LONGER + SHORTER
    assert metrics["test/rewards/accuracies"]["value"] == pytest.approx(32 / 44, abs=1e-6)
    assert metrics["test/reliance/words/correlation"]["value"] == 1.0
    assert metrics["test/reliance/words/after_length"]["value"] is None  # tokens order the pairs as words do


def test_a_policy_that_ignores_length_has_no_reliance_within_its_interval(tmp_path):
    bench = Bench(tmp_path, biased_pairs())
    margins = np.resize([1.0, 1.0, 1.0, -1.0, 1.0], LONGER + SHORTER + EQUAL)  # right in four of five
    metrics = bench.evidence(margins).metrics
    found = metrics["test/reliance/tokens/reliance"]
    assert found["value"] == pytest.approx(0.0, abs=1e-6) and found["low"] < 0 < found["high"]
    assert metrics["test/reliance/tokens/balanced"]["value"] == pytest.approx(0.8, abs=1e-6)


def test_pairs_without_a_finite_margin_are_in_no_quantity(tmp_path):
    bench = Bench(tmp_path, biased_pairs())
    margins = bench.differences()["tokens"].copy()
    margins[:5] = np.nan
    metrics = bench.evidence(margins).metrics
    assert metrics["test/non_finite"] == 5
    assert metrics["test/reliance/tokens/aligned"]["n"] == LONGER - 5


def test_the_page_s_table_has_a_row_for_each_feature_that_differs_and_names_the_others(tmp_path):
    bench = Bench(tmp_path, biased_pairs(), panel=["markdown", "tokens", "words"])
    metrics = bench.evidence(bench.differences()["tokens"]).metrics
    rows = evidence.reliance_rows(metrics, "test")
    assert [row.feature for row in rows] == ["length in tokens", "length in words"]
    cells = {cell.name: cell for cell in rows[0].cells}
    assert cells["reliance"].value == "+1.000 [+1.000, +1.000]" and cells["reliance"].n == LONGER + SHORTER
    assert (
        cells["chosen has less of it"].n == SHORTER
        and cells["chosen has less of it"].note == "too few pairs to tell"
    )
    assert evidence.equal_features(metrics, "test") == ["markdown"]
    assert evidence.reliance_rows({}) == evidence.equal_features({}) == []


def test_a_feature_sees_the_last_user_turn_and_the_final_answer(tmp_path):
    asked = [message("system", "one"), message("user", "one"), message("assistant", "one")]
    asked.append(message("user", "river boat"))
    bench = Bench(tmp_path, [pair(0, asked, "river boat tea", "one tea")])
    found = bench.differences()
    assert found["tokens"].tolist() == [1] and found["words"].tolist() == [1]
    assert found["word_overlap"].tolist() == pytest.approx([2 / 3])  # "one" stands in earlier turns alone


def test_differences_follow_the_pairs_asked_for_and_an_unknown_pair_is_refused(tmp_path):
    bench = Bench(tmp_path, biased_pairs())
    path = Artifact(bench.store, bench.features()).path("test.parquet")
    ids = [bench.rows[LONGER]["pair_id"], bench.rows[0]["pair_id"]]
    assert read_differences(path, ids)["tokens"].tolist() == [-2, 2]
    with pytest.raises(StoreError, match="pair nowhere"):
        read_differences(path, ["nowhere"])


def write_own(folder, monkeypatch, body, allowed="own_panel"):
    (folder / "own_panel.py").write_text(body)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("SERA_EXTENSIONS", allowed)
    monkeypatch.delitem(__import__("sys").modules, "own_panel", raising=False)


OWN = "own_panel:letters"
LETTERS = "def letters(prompt, response):\n    return response.count('b')\n"


def test_a_feature_of_one_s_own_is_measured_and_its_source_is_in_the_step(tmp_path, monkeypatch):
    write_own(tmp_path, monkeypatch, LETTERS)
    bench = Bench(tmp_path, biased_pairs(), panel=["tokens", OWN])
    assert bench.differences()[OWN].tolist()[:1] == [3]  # a `b` in each of three words
    record = Artifact(bench.store, bench.features()).record
    assert record.fields["sources"] == {OWN: source_hash(OWN, "feature")}
    write_own(tmp_path, monkeypatch, LETTERS.replace("'b'", "'t'"))
    assert bench.features().key != record.key


def test_a_feature_of_one_s_own_that_fails_names_the_side_and_the_row(tmp_path, monkeypatch):
    write_own(tmp_path, monkeypatch, "def letters(prompt, response):\n    return 1 / 0\n")
    bench = Bench(tmp_path, biased_pairs(), panel=["tokens", OWN])
    with pytest.raises(InputError, match=r"pairs of train: feature 'own_panel:letters', row 0: ZeroDivision"):
        bench.features()


def test_the_evidence_file_holds_the_same_as_the_record(tmp_path):
    bench = Bench(tmp_path, biased_pairs())
    record = bench.evidence(bench.differences()["tokens"])
    held = json.loads(Artifact(bench.store, record.ref).path("evidence.json").read_text())
    assert held == record.metrics
