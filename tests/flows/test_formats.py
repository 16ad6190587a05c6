"""Stores of every format there ever was are read; records of a later one are refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import tinyrun
from fixtures import make_store

import sera_core
from sera_core.artifacts import lease
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.store import open_store
from sera_core.errors import StoreError

ABSOLUTE = re.compile(rb"(?:(?<![\w:/.<-])|(?<=file://))/[A-Za-z]\w+/[\w.-]{2,}")
"""A path from the root, of two parts or more."""
KEPT = sorted((Path(__file__).parents[1] / "fixtures").glob("store-format-*"))


def test_there_is_a_store_of_every_format():
    assert [path.name for path in KEPT] == [f"store-format-{n}" for n in range(1, FORMAT + 1)]


def test_the_kept_stores_are_small_and_hold_no_path_of_the_machine_that_made_them():
    for store in KEPT:
        files = [path for path in store.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 1_000_000
        for path in files:
            absolute = ABSOLUTE.search(path.read_bytes())
            assert absolute is None, (path, absolute)


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_an_older_store_is_listed_shown_verified_compared_and_read(kept, tmp_path, sera):
    store = str(shutil.copytree(kept, tmp_path / "store"))

    def answer(*args: str) -> dict:
        return sera(*args, "--store", store, "--json").json

    assert [run["run"] for run in answer("list")["runs"]] == ["first", "second"]
    shown = answer("show", "first")
    assert [r["round"] for r in shown["rounds"]] == [0, 1]
    assert shown["stop_reason"] == "max_rounds"
    assert answer("verify", "first")["ok"]
    assert not answer("diff", "first", "second")["same_artifacts"]
    assert answer("gc", "--older-than", "0")["steps_kept"] > 30
    run = sera_core.open_run(store, "first")
    assert len(run[1].pairs()) == sum(shown["rounds"][1]["pairs"].values())
    assert (run[1].policy_path() / "model.safetensors").exists()


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_an_older_run_goes_on(kept, tmp_path):
    """With one more round allowed, what the older version made is reused."""
    store = tmp_path / "store"
    shutil.copytree(kept, store)
    tiny.tiny_policy(tmp_path / "sources" / "policy", layers=1, hidden=32)
    config = tinyrun.config(tmp_path / "sources", **{**make_store.SMALL, "limits": {"rounds": 3}})
    before = {path: path.read_bytes() for path in store.glob("steps/*/*/done.json")}
    records = tinyrun.work(config, store, "first")
    assert len(records.rounds()) == 3
    assert {path: path.read_bytes() for path in before} == before


RECORDS = [
    ("runs/first/run-000.json", ["show", "first"]),
    ("runs/first/round-001.json", ["show", "first"]),
    ("runs/first/final-000.json", ["verify", "first"]),
    ("steps/train/*/done.json", ["verify", "first"]),
    ("steps/sample/*/part-00000.json", ["verify", "first"]),
    ("runs/first/lease/00000.json", ["advance", "first"]),
    ("runs/first/lease/00000-beat.json", ["advance", "first"]),
]


@pytest.mark.parametrize(("pattern", "command"), RECORDS, ids=[pattern for pattern, _ in RECORDS])
def test_a_record_of_a_newer_version_is_refused_by_name(kept_store, sera, pattern, command):
    if command[0] == "advance":  # nothing is held of a run that has stopped: make it open
        (kept_store / "runs" / "first" / "round-001.json").unlink()
    for path in kept_store.glob(pattern):
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": FORMAT + 1, "new": True}))
    said = sera(*command, "--store", kept_store, code=1).err
    assert f"written by a newer sera-flow (format {FORMAT + 1}, this version reads up to {FORMAT}" in said
    assert Path(pattern).name in said


DEEP = '{"a":' * 200_000 + "1" + "}" * 200_000


@pytest.mark.parametrize(
    "record",
    ["[]", '"text"', "{}", '{"format": "1"}', '{"format": true}', "{", DEEP],
    ids=["list", "text", "empty", "text format", "true format", "cut off", "deep"],
)
def test_what_is_no_record_is_refused_by_name(kept_store, sera, record):
    (kept_store / "runs" / "first" / "run-000.json").write_text(record)
    assert "run-000.json" in sera("show", "first", "--store", kept_store, code=1).err


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("select", "rule", "best"),
        ("model", "nothing", 1),
        ("limits", "rounds", "many"),
        ("train", "beta", None),
    ],
)
def test_a_recorded_configuration_that_cannot_be_read_names_the_setting(
    kept_store, sera, section, name, value
):
    for path in kept_store.glob("runs/first/run-*.json"):
        record = json.loads(path.read_text())
        record["config"][section][name] = value
        path.write_text(json.dumps(record))
    for command in (["report", "first", "--out", str(kept_store / "page")], ["advance", "first"]):
        (kept_store / "runs" / "first" / "round-001.json").unlink(missing_ok=True)
        said = sera(*command, "--store", kept_store, code=1).err
        assert f"run 'first': the recorded configuration cannot be read ({section}.{name}: " in said
        assert said.count("\n") == 1 and "pydantic" not in said


def test_a_record_with_a_field_that_is_missing_or_unknown_names_it(kept_store):
    path = kept_store / "runs" / "first" / "lease" / "00000.json"
    record = json.loads(path.read_text())
    for wrong, field in (({**record, "epoch": "x"}, "epoch"), ({**record, "more": 1}, "more")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(StoreError, match=rf"00000\.json: invalid Epoch \({field}") as refused:
            lease.look(open_store(str(kept_store)), "runs/first/lease")
        assert "input_value" not in str(refused.value)
