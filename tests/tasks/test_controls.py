"""Controls are controls: what a round trains on, by rule and share, from selection through the mix's step."""

import numpy as np
import pytest
import tinyrun

from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepRef, StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from tasks.mixing import mix_pairs
from tasks.reviewing import select_pairs

PAIRS = 800
SHARES = (0.3, 0.5, 0.7)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("controls"))


class Bench:
    """Pairs of both kinds with known margins, selected and mixed by the steps themselves."""

    def __init__(self, folder):
        self.folder = folder
        self.store = open_store(str(folder / "store"))
        rng = np.random.default_rng(5)
        self.margins = {kind: np.sort(rng.normal(1, 1, PAIRS)) for kind in ("human", "generated")}
        self.rendered = self.put("render", self._pairs("human"))
        self.responses = self.put("pair", self._pairs("generated"))

    def put(self, step, work, **inputs):
        spec = StepSpec(step=step, version=1, fields={"n": len(inputs)}, inputs=inputs)
        return run_step(self.store, spec, work, ExecutionConfig()).ref

    def ids(self, kind):
        rng = np.random.default_rng(len(kind))  # not in the order of the margins
        return [f"{kind[0]}{n:015x}" for n in rng.permutation(PAIRS)]

    def _pairs(self, kind):
        def work(attempt):
            margins = self.margins[kind]
            rows = [
                {"pair_id": id, "prompt_id": id, "origin": kind}
                | {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
                for id in self.ids(kind)
            ]
            scored = [
                {"pair_id": row["pair_id"], "margin": m, "ensemble_margin": m}
                for row, m in zip(rows, margins.tolist(), strict=True)
            ]
            name = "train.parquet" if kind == "human" else "pairs.parquet"
            schema.write_table(schema.from_rows(schema.PAIRS, rows), attempt.write(name))
            schema.write_table(schema.from_rows(schema.SCORED, scored), attempt.write("scored.parquet"))
            for empty in ("dropped.parquet", "ledger.parquet"):
                schema.write_table(schema.from_rows(schema.LEDGER, []), attempt.write(empty))
            attempt.write("flipped.json").write_text("[]")
            return [name, "scored.parquet", "dropped.parquet", "ledger.parquet", "flipped.json"]

        return work

    def trained(self, round, **rules):
        """The mean percentile of the margin, and the ids, of each kind's pairs trained on in a round."""
        config = tinyrun.config(self.folder, select=rules, select_generated=rules, mix={"shares": SHARES})
        ledgers = {}
        for kind, pairs in (("human", self.rendered), ("generated", self.responses)):
            spec = steps.select(config, rules_of(config, kind), pairs, pairs, kind, round)
            ledgers[f"{kind}_ledger"] = run_step(self.store, spec, select_pairs, ExecutionConfig()).ref
        inputs: dict[str, StepRef | None] = {
            "rendered": self.rendered,
            "responses": self.responses,
            **ledgers,
        }
        spec = steps.mix(config, round, SHARES[round - 1], "none", inputs)
        record = run_step(self.store, spec, mix_pairs, ExecutionConfig())
        rows = list(schema.iter_rows(Artifact(self.store, record.ref).path("mixture.parquet"), ["pair_id"]))
        taken = {row["pair_id"] for row in rows}
        assert record.metrics["generated_share"] == pytest.approx(SHARES[round - 1], abs=0.01)
        places = {
            kind: np.array([n for n, id in enumerate(self.ids(kind)) if id in taken]) for kind in self.margins
        }
        return {kind: float(p.mean() / (PAIRS - 1)) for kind, p in places.items()}, taken


def rules_of(config, kind):
    return config.select if kind == "human" else config.select_generated


@pytest.mark.parametrize("round", [1, 2, 3])
def test_what_a_control_trains_on_is_not_chosen_by_margin(bench, round):
    preferred, largest = bench.trained(round, rule="top-fraction")
    drawn, _ = bench.trained(round, rule="random")
    bottom, _ = bench.trained(round, rule="bottom")
    small, smallest = bench.trained(round, rule="top-fraction", direction="small")
    none, everything = bench.trained(round, rule="none")
    relabelled, _ = bench.trained(round, rule="relabel")
    for kind in ("human", "generated"):
        assert preferred[kind] > 0.6
        assert bottom[kind] < 0.4
        assert small[kind] < 0.5 < preferred[kind]
        for control in (drawn, none, relabelled):
            assert control[kind] == pytest.approx(0.5, abs=0.03)
    assert len({frozenset(largest), frozenset(smallest), frozenset(everything)}) == 3


def test_prompt_variance_keeps_the_generated_pairs_of_the_prompts_that_vary_most(tmp_path):
    """From a whole run: the rule is computed again from the responses' rewards alone."""
    rules = {"rule": "prompt-variance", "fraction": 0.5, "min_margin": -np.inf}
    config = tinyrun.config(tmp_path, select_generated=rules, limits={"rounds": 2})
    made = tinyrun.work(config, tmp_path / "store").rounds()[1].steps
    store = open_store(str(tmp_path / "store"))
    rewards: dict[str, list[float]] = {}
    for row in schema.iter_rows(Artifact(store, made["responses"]).path("responses.parquet")):
        rewards.setdefault(row["prompt_id"], []).append(row["ensemble_reward"])
    spread = {
        prompt: np.mean([(1 / (1 + np.exp(b - a)) - 0.5) ** 2 for a in r for b in r if a is not b])
        for prompt, r in rewards.items()
    }
    ledger = list(schema.iter_rows(Artifact(store, made["generated"]).path("ledger.parquet")))
    kept = [spread[row["prompt_id"]] for row in ledger if row["kept"]]
    dropped = [spread[row["prompt_id"]] for row in ledger if not row["kept"]]
    assert len(ledger) >= 4 and len(kept) == (len(ledger) + 1) // 2 and min(kept) >= max(dropped)


def test_human_pairs_have_no_prompt_variance(tmp_path):
    with pytest.raises(ValueError, match="set select_generated"):
        tinyrun.config(tmp_path, select={"rule": "prompt-variance"})
