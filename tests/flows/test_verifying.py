"""`sera verify`: whatever is changed in a run's chain, it is named; what holds is counted."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tinyrun
from fixtures import make_store

from flows.store_tools.verify import verify
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.errors import StoreError


def records_of(store: Path, run: str = "first") -> RunStore:
    return RunStore(open_store(str(store)), run)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def step_of(store: Path, role: str, round: int = 1) -> Path:
    ref = records_of(store).rounds()[round].steps[role]
    return store / "steps" / ref.step / ref.key


def test_a_whole_run_holds_and_is_counted(kept_store, sera):
    found = sera("verify", "first", "--store", kept_store, "--json").json
    needed = steps_of(kept_store)
    files = [
        file
        for done in kept_store.glob("steps/*/*/done.json")
        for file in json.loads(done.read_text())["files"].values()
        if done.parent.name in needed
    ]
    assert found == {
        "run": "first",
        "ok": True,
        "rounds": 2,
        "steps": len(needed),
        "links": found["links"],
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files),
    }
    assert found["links"] > found["steps"]


def steps_of(store: Path) -> set[str]:
    """Keys of everything `first` rests on, the evidence on the test side included."""
    found: set[str] = set()
    records = records_of(store)
    final = json.loads((store / "runs" / "first" / "final-000.json").read_text())["step"]
    waiting = [(ref.step, ref.key) for r in records.rounds() for ref in r.used] + [
        (final["step"], final["key"])
    ]
    while waiting:
        step, key = waiting.pop()
        if key in found:
            continue
        found.add(key)
        inputs = json.loads((store / "steps" / step / key / "done.json").read_text())["inputs"].values()
        waiting += [(ref["step"], ref["key"]) for ref in inputs]
    return found


def test_one_changed_byte_in_any_file_is_found_and_the_file_is_named(kept_store):
    tried, needed = 0, steps_of(kept_store)
    for done in sorted(kept_store.glob("steps/*/*/done.json")):
        for name, file in json.loads(done.read_text())["files"].items():
            if done.parent.name not in needed or (tried := tried + 1) % 4:
                continue  # every fourth is enough: all are read in one loop
            path = done.parent / file["attempt"] / name
            whole = path.read_bytes()
            at = len(whole) // 2
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(StoreError, match="it was changed") as failed:
                verify(records_of(kept_store))
            assert str(path) in str(failed.value)
            path.write_bytes(whole)
    assert tried > 60
    verify(records_of(kept_store))


def test_a_run_without_a_finished_round_has_nothing_to_verify_yet(kept_store, sera):
    for path in kept_store.glob("runs/first/*-00*.json"):
        if not path.name.startswith("run-"):
            path.unlink()
    said = sera("verify", "first", "--store", kept_store).out
    assert "no round is finished yet" in said and "start policy" not in said
    change(kept_store / "runs" / "first" / "run-000.json", config_sha256="0" * 64)
    sera("verify", "first", "--store", kept_store, code=1)


def cut_off(store: Path) -> Path:
    path = next(step_of(store, "policy").glob("*/policy/model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    return path


def lose_a_file(store: Path) -> Path:
    path = next(step_of(store, "mixture").glob("*/ledger.parquet"))
    path.unlink()
    return path


def lose_a_record(store: Path) -> Path:
    path = step_of(store, "scored") / "done.json"
    path.unlink()
    return path


def lose_a_part(store: Path) -> Path:
    path = step_of(store, "samples") / "part-00000.json"
    path.unlink()
    return path


def change_a_setting_of_a_step(store: Path) -> Path:
    path = step_of(store, "policy") / "done.json"
    fields = json.loads(path.read_text())["fields"]
    change(path, fields={**fields, "learning_rate": 1.0})
    return path


def change_what_a_step_was_made_from(store: Path) -> Path:
    path = step_of(store, "mixture") / "done.json"
    inputs = json.loads(path.read_text())["inputs"]
    inputs["scored"]["digest"] = "0" * 64
    change(path, inputs=inputs)
    return path


def put_another_file_into_a_record(store: Path) -> Path:
    path = step_of(store, "report") / "done.json"
    other = step_of(store, "report", round=0)
    record = json.loads((other / "done.json").read_text())
    for file in other.glob("*/report.html"):
        target = path.parent / file.parent.name / file.name
        target.parent.mkdir()
        shutil.copy(file, target)
    change(path, files=record["files"])
    return path


def change_an_earlier_round(store: Path) -> Path:
    change(store / "runs" / "first" / "round-000.json", created="2026-01-01T00:00:00+00:00")
    return store / "runs" / "first" / "round-001.json"


def take_a_round_from_another_run(store: Path) -> Path:
    path = store / "runs" / "first" / "round-001.json"
    shutil.copy(store / "runs" / "second" / "round-001.json", path)
    change(path, parent_sha256=hashlib.sha256(path.with_name("round-000.json").read_bytes()).hexdigest())
    return path


def change_the_configuration(store: Path) -> Path:
    path = store / "runs" / "first" / "run-000.json"
    resolved = json.loads(path.read_text())["resolved"]
    change(path, resolved={**resolved, "seed": 9})
    return path


def promote_a_policy_of_elsewhere(store: Path) -> Path:
    """Round 0 claims the policy that round 1 made of round 0's."""
    path = store / "runs" / "first" / "round-000.json"
    later = json.loads((store / "runs" / "first" / "round-001.json").read_text())
    (store / "runs" / "first" / "round-001.json").unlink()
    steps = json.loads(path.read_text())["steps"]
    change(path, steps={**steps, "policy": later["steps"]["policy"]})
    return path


def name_another_file_as_an_artifact(store: Path) -> Path:
    path = store / "runs" / "first" / "round-001.json"
    artifacts = json.loads(path.read_text())["artifacts"]
    artifacts["ledger"] = artifacts["ledger"] | {"path": "nothing.parquet"}
    change(path, artifacts=artifacts)
    return path


def change_the_test_sides_evidence(store: Path) -> Path:
    final = json.loads((store / "runs" / "first" / "final-000.json").read_text())["step"]
    path = next((store / "steps" / "test" / final["key"]).glob("*/test.parquet"))
    path.write_bytes(path.read_bytes() + b"!")
    return path


@pytest.mark.parametrize(
    "tamper",
    [
        cut_off,
        lose_a_file,
        lose_a_record,
        lose_a_part,
        change_a_setting_of_a_step,
        change_what_a_step_was_made_from,
        put_another_file_into_a_record,
        change_an_earlier_round,
        take_a_round_from_another_run,
        change_the_configuration,
        promote_a_policy_of_elsewhere,
        name_another_file_as_an_artifact,
        change_the_test_sides_evidence,
    ],
)
def test_what_does_not_hold_is_named(kept_store, tamper, sera):
    named = tamper(kept_store)
    assert str(named) in sera("verify", "first", "--store", kept_store, code=1).err


def test_an_answer_changed_after_the_decision_is_found(tmp_path):
    tiny.tiny_policy(tmp_path / "sources" / "policy", layers=1, hidden=32)
    asked = {**make_store.SMALL, "limits": {"rounds": 1}, "decide": {"min_pairs": 4, "review": "always"}}
    config = tinyrun.config(tmp_path / "sources", **asked)
    records = tinyrun.work(config, tmp_path / "store", "first")
    records.answer(0, "stop", "enough", "ada")
    records = tinyrun.work(config, tmp_path / "store", "first")
    assert records.rounds()[0].decision == "stop"
    assert verify(records).rounds == 1
    path = tmp_path / "store" / "runs" / "first" / "review-000-answer.json"
    change(path, who="eve")
    with pytest.raises(StoreError, match="differs from the answer in the decision") as failed:
        verify(records)
    assert str(path) in str(failed.value)
