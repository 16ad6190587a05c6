"""`sera diff`: what differs is named with both values, and what is equal is left out."""

import json
import shutil

import pytest

from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store


@pytest.fixture
def diff(kept_store, sera):
    def answer(left: str, right: str) -> dict:
        return sera("diff", left, right, "--store", kept_store, "--json").json

    return answer


def test_two_runs_differ_in_a_setting_and_in_what_followed_from_it(diff, kept_store):
    found = diff("first", "second")
    assert set(found) == {"left", "right", "same_artifacts", "config", "steps", "metrics"}
    assert found["left"] == {"run": "first", "round": 1} and found["right"] == {"run": "second", "round": 1}
    assert found["config"] == [{"key": "select.fraction", "left": 0.7, "right": 0.5, "changes_result": True}]
    steps = {row["role"]: row for row in found["steps"]}
    assert {"human", "mixture", "policy", "evidence"} <= set(steps)
    assert not {"data", "model", "pairs", "scored", "samples"} & set(steps)  # the cut comes after them
    rounds = [RunStore(open_store(str(kept_store)), run).rounds()[1] for run in ("first", "second")]
    assert steps["policy"] == {
        "role": "policy",
        "left": rounds[0].steps["policy"].model_dump(),
        "right": rounds[1].steps["policy"].model_dump(),
        "why": "other settings or inputs",
    }
    metrics = {row["metric"]: row for row in found["metrics"]}
    for name, row in metrics.items():
        assert row["left"] == rounds[0].metrics.get(name) != row["right"] == rounds[1].metrics.get(name)
    assert metrics["human/kept"]["left"] > metrics["human/kept"]["right"]
    assert "seconds" in metrics and "heldout/non_finite" not in metrics


def test_a_round_that_both_share_is_the_same_bytes(diff):
    found = diff("first:0", "second:0")
    assert found["same_artifacts"] and found["steps"] == []
    assert [row["key"] for row in found["config"]] == ["select.fraction"]


def test_rounds_of_one_run_differ_in_steps_alone(diff):
    found = diff("first:0", "first:1")
    assert found["config"] == []
    why = {row["role"]: row["why"] for row in found["steps"]}
    assert why["samples"] == "only right" and why["policy"] == "other settings or inputs"


def test_a_setting_that_changes_no_result_is_told_apart(diff, kept_store):
    path = kept_store / "runs" / "second" / "run-000.json"
    record = json.loads(path.read_text())
    record["config"]["execution"]["micro_batch"] = 3
    record["config"]["data"]["train"][0]["path"] = "elsewhere.jsonl"
    path.write_text(json.dumps(record))
    changed = {row["key"]: row["changes_result"] for row in diff("first", "second")["config"]}
    assert changed["execution.micro_batch"] is False and changed["select.fraction"] is True
    assert changed["data.train.0.path"] is False


def test_the_same_work_with_other_content_is_told_apart_from_other_work(diff, kept_store):
    shutil.copytree(kept_store / "runs" / "first", kept_store / "runs" / "again")
    path = kept_store / "runs" / "again" / "round-001.json"
    manifest = json.loads(path.read_text())
    manifest["steps"]["policy"]["digest"] = "0" * 64
    path.write_text(json.dumps(manifest))
    (row,) = diff("first", "again")["steps"]
    assert row["role"] == "policy" and row["why"] == "same step, other content"


def test_a_run_without_a_finished_round_still_has_settings(diff, kept_store):
    for path in (kept_store / "runs" / "second").glob("round-*.json"):
        path.unlink()
    found = diff("first", "second")
    assert found["right"] == {"run": "second", "round": None}
    assert found["config"] and {row["why"] for row in found["steps"]} == {"only left"}


def test_for_people_it_is_tables(kept_store, sera):
    text = sera("diff", "first:0", "second:0", "--store", kept_store).out
    assert "first:0 vs second:0" in text and "All steps have the same content." in text
    assert "select.fraction" in text


@pytest.mark.parametrize(
    "side", ["first:2", "first:-1", "first:x", "first:", "first:１", "nobody", "nobody:0", "../x"]
)
def test_a_run_or_round_that_is_not_there_is_named(kept_store, sera, side):
    assert repr(side.split(":")[0])[1:-1] in sera("diff", side, "second", "--store", kept_store, code=2).err
