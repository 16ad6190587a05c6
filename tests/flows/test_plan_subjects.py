"""A plan says of each step what it works on, so that no two rows of a round read alike."""

import re
from collections import Counter

import pytest
import tinyrun

from flows.planning.plan import plan

SETTINGS = {
    "plain": {},
    "folds, and answers of the start policy": {
        "review": {"crossfit": 2},
        "pairing": {"allow_cut": True, "rule": "best-anchored"},
        "train": {"learning_rate": 1e-3, "batch": 8, "ld_alpha": 0.5},
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_two_steps_of_a_round_have_the_same_name(tmp_path, name):
    found = plan(tinyrun.config(tmp_path, **SETTINGS[name]), "tiny", str(tmp_path / "store"))
    named = Counter((row["round"], row["step"], row["subject"]) for row in found["steps"])
    assert [row for row, count in named.items() if count > 1] == []
    assert not any("a policy" in (row["subject"] or "") for row in found["steps"])


def test_a_step_is_named_by_its_policy_and_its_texts(tmp_path):
    found = plan(tinyrun.config(tmp_path, **SETTINGS["plain"]), "tiny", str(tmp_path / "store"))
    rows = [(row["step"], row["subject"]) for row in found["steps"] if row["round"] == 1]
    assert rows[:6] == [
        ("logps", "policy 0, a few human pairs"),
        ("logps", "start policy, a few human pairs"),
        ("review", None),
        ("select", "human pairs"),
        ("sample", "policy 0, prompts"),
        ("logps", "policy 0, a few answers"),
    ]
    assert ("train", "policy 1") in rows and ("logps", "policy 1, held-out pairs") in rows


@pytest.mark.parametrize("columns", [80, 160])
def test_the_table_has_these_names_and_tenths_of_seconds(tmp_path, sera, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = sera("plan", tinyrun.experiment(tmp_path), "--store", tmp_path / "store").out
    (row,) = re.findall(r"(│ 1 +│ logps: policy 1,.*\n.*)\n", out)[:1]
    assert "held-out pairs" in row
    assert re.search(r"│ – +│ data +│ run .*│ 0 +│ 1\.0 +│", out)
