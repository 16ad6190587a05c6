"""What gc takes and leaves: nothing that a run rests on, nothing that an unfinished one would reuse."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import tiny
import tinyrun
from fixtures import make_store

from flows.store_tools import garbage
from flows.store_tools.garbage import collect
from flows.store_tools.verify import verify
from sera_core.artifacts.lease import claim_path, hold, look, take
from sera_core.artifacts.local_store import LocalStore
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import create_json, open_store
from sera_core.errors import BusyError, InputError, StoreError
from tasks import sampling

pytestmark = pytest.mark.slow

DAY = 86400.0


@pytest.fixture
def sources(tmp_path):
    """What the stores were made from."""
    tiny.tiny_policy(tmp_path / "sources" / "policy", layers=1, hidden=32)
    return tinyrun.config(tmp_path / "sources", **make_store.SMALL)


def aged(store: Path, days: float = 30) -> Path:
    """Make everything in the store so old."""
    then = time.time() - days * DAY
    for path in store.rglob("*"):
        os.utime(path, (then, then))
    return store


def files(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*") if p.is_file()}


def gc(store: Path, older_than: float = 7 * DAY) -> dict:
    return collect(open_store(str(store)), delete=True, older_than=older_than)


def holds(store: Path, run: str) -> bool:
    return verify(RunStore(open_store(str(store)), run)).files > 0


def test_finished_runs_lose_nothing_but_the_claims_of_their_steps(kept_store):
    before = files(aged(kept_store))
    found = gc(kept_store)
    left = files(kept_store)
    gone = before.keys() - left.keys()
    assert gone and all("/claim/" in path for path in gone)
    assert {path: left[path] for path in left} == {path: before[path] for path in left}
    assert found["bytes"] == sum(len(before[path]) for path in gone)
    assert found["bytes_kept"] == sum(map(len, left.values()))
    assert holds(kept_store, "first") and holds(kept_store, "second")
    assert gc(kept_store)["items"] == []


@pytest.fixture
def read_only(kept_store, monkeypatch):
    """A store that may only be read: to root, who runs tests, modes forbid nothing."""

    def refusing(true):
        def call(path, *args, **kwargs):
            if Path(path).is_relative_to(kept_store):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return true(path, *args, **kwargs)

        return call

    shutil.rmtree(aged(kept_store) / "runs" / "second")
    for name in ("touch", "unlink", "write_bytes", "rename", "replace", "mkdir", "rmdir"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    return kept_store


def test_a_store_that_may_only_be_read_is_listed_by_the_machines_clock(read_only, sera, caplog):
    assert sera("gc", "--json", "--store", read_only).json["items"]
    assert caplog.text.count("this machine's clock") == 1
    assert "needs permission to write" in sera("gc", "--delete", "--store", read_only, code=1).err


def test_without_delete_nothing_changes(kept_store, sera):
    shutil.rmtree(aged(kept_store) / "runs" / "second")
    before = files(kept_store)
    found = sera("gc", "--store", kept_store, "--json").json
    assert set(found) == {
        "store", "deleted", "older_than_seconds", "steps_kept", "bytes_kept", "bytes", "bytes_later", "items",
        "restored",
    }  # fmt: skip
    assert found["items"] and not found["deleted"] and found["older_than_seconds"] == 7 * DAY
    assert all(set(item) == {"path", "why", "files", "bytes"} for item in found["items"])
    assert "Nothing was deleted; use --delete." in sera("gc", "--store", kept_store).out
    assert files(kept_store) == before


def test_steps_of_a_run_that_is_gone_go_in_two_passes_and_shared_ones_stay(kept_store):
    own = own_steps(kept_store, "second", "first")
    shutil.rmtree(aged(kept_store) / "runs" / "second")
    first = gc(kept_store)
    assert first["bytes_later"] > 100_000
    for path in own:
        assert not (kept_store / path / "done.json").exists()
        assert (kept_store / path / "collected.json").exists()
    assert list(kept_store.glob("steps/train/*/*/policy/model.safetensors"))[2:]  # the files are there still
    assert gc(kept_store)["items"] == []  # what was taken is young: its files wait
    gc(aged(kept_store))
    assert not any((kept_store / path).exists() for path in own)
    assert holds(kept_store, "first")


def own_steps(store: Path, run: str, other: str) -> list[str]:
    used = [
        {
            f"steps/{ref.step}/{ref.key}"
            for r in RunStore(open_store(str(store)), name).rounds()
            for ref in r.used
        }
        for name in (run, other)
    ]
    assert used[0] - used[1] and used[0] & used[1]
    return sorted(used[0] - used[1])


def test_a_record_is_put_back_when_a_run_came_to_rest_on_it_between_the_passes(kept_store, tmp_path):
    shutil.copytree(kept_store / "runs" / "second", tmp_path / "second")
    shutil.rmtree(aged(kept_store) / "runs" / "second")
    before = files(kept_store)
    gc(kept_store)
    shutil.copytree(tmp_path / "second", kept_store / "runs" / "second")
    with pytest.raises(StoreError, match="missing, but"):
        holds(kept_store, "second")
    gc(aged(kept_store))
    assert holds(kept_store, "second")
    left = files(kept_store)
    assert not [path for path in before if "/claim/" not in path and path not in left]
    assert not list(kept_store.rglob("collected.json"))


def test_a_record_is_put_back_at_once_when_a_run_found_it_while_it_was_taken(
    kept_store, tmp_path, monkeypatch
):
    shutil.move(aged(kept_store) / "runs" / "second", tmp_path / "second")
    taken = []

    def delete_record_late(store, place):
        garbage_take(store, place)
        taken.append(place)
        if len(taken) == 1:
            shutil.copytree(tmp_path / "second", kept_store / "runs" / "second")

    garbage_take = garbage.delete_record
    monkeypatch.setattr(garbage, "delete_record", delete_record_late)
    assert len(gc(kept_store)["restored"]) == len(taken) > 1
    assert holds(kept_store, "second")


def test_nothing_younger_is_touched(kept_store):
    shutil.rmtree(kept_store / "runs" / "second")
    before = files(aged(kept_store, days=6))
    assert gc(kept_store)["items"] == []
    assert files(kept_store) == before


@pytest.mark.parametrize("killed", ["before the manifest", "in sampling", "in the middle of the round"])
def test_a_killed_unfinished_run_loses_nothing(present_store, sources, killed):
    """Resumed after two passes of gc, it ends with the policy it would have had, and repeats no step."""
    records = RunStore(open_store(str(present_store)), "first")
    policies, used = tinyrun.policy_shas(records), records.rounds()[1].used
    expected = {ref.key for ref in used}
    for name in ("round-001.json", "final-001.json", "final-000.json"):
        (present_store / "runs" / "first" / name).unlink(missing_ok=True)
    sampled = next(ref for ref in used if ref.step == "sample")
    lost = {
        "before the manifest": [],
        "in sampling": used[[ref.key for ref in used].index(sampled.key) :],
        "in the middle of the round": used[len(used) // 2 :],
    }[killed]
    shared = {ref.key for ref in records.rounds()[0].used}
    for ref in lost:
        if ref.key not in shared:
            (present_store / "steps" / ref.step / ref.key / "done.json").unlink()
    half = present_store / "steps" / "sample" / sampled.key / ("f" * 16) / "part-00000.parquet"
    half.parent.mkdir()
    half.write_bytes(b"half a file")
    before = files(aged(present_store))
    gc(present_store)
    gc(aged(present_store))
    assert not half.exists()
    left = files(present_store)
    needed = {path for path in before if path.split("/")[2] in expected and "/claim/" not in path}
    done = {ref.key for ref in used if ref.key in shared or ref not in lost}
    assert not [
        path for path in needed if path.split("/")[2] in done and path not in left and "f" * 16 not in path
    ]
    made = set(present_store.glob("steps/*/*/done.json"))
    again = tinyrun.work(sources, present_store, "first")
    assert tinyrun.policy_shas(again) == policies
    redone = {path.parent.name for path in present_store.glob("steps/*/*/done.json")} - {
        p.parent.name for p in made
    }
    assert redone & expected == {ref.key for ref in lost} - shared
    if killed == "in sampling":  # the shard that was finished before the kill was not sampled again
        step = present_store / "steps" / "sample" / sampled.key
        part = json.loads((step / "part-00000.json").read_text())
        assert (
            before[f"steps/sample/{sampled.key}/part-00000.json"] == (step / "part-00000.json").read_bytes()
        )
        assert all((step / file["attempt"] / name).exists() for name, file in part["files"].items())


def test_shards_behind_a_gap_are_no_fault_outlive_gc_and_are_not_done_again(tmp_path, sources, monkeypatch):
    """Killed when the second of four shards, of a worker that died, was not recorded yet."""
    monkeypatch.setattr(sampling, "SHARD_PROMPTS", 1)
    store = tmp_path / "store"
    records = tinyrun.work(sources, store, "first")
    policies = tinyrun.policy_shas(records)
    (step,) = [path.parent for path in store.glob("steps/sample/*/part-00003.json")]
    kept = {path: path.read_bytes() for path in step.glob("part-*.json")}
    del kept[step / "part-00001.json"]
    ended = store.glob("runs/first/final-*.json")
    for path in (step / "done.json", step / "part-00001.json", *ended, store / "runs/first/round-001.json"):
        path.unlink()
    assert holds(aged(store), "first")
    gc(store)
    gc(aged(store))
    assert holds(store, "first")
    left = {path.name for path in step.glob("*/part-*")}
    assert left == {f"part-{number:05d}.parquet" for number in (0, 2, 3)}, "only the unrecorded one goes"
    written = {path: path.stat().st_mtime_ns for path in step.glob("*/part-*")}
    assert tinyrun.policy_shas(tinyrun.work(sources, store, "first")) == policies
    assert {path: path.read_bytes() for path in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(list(step.glob("*/part-*"))) == 4 and holds(store, "first")


def test_the_answered_round_of_a_waiting_run_is_kept(tmp_path, sources, monkeypatch):
    tiny_review = sources.model_copy(
        update={
            "decide": sources.decide.model_copy(update={"review": "always"}),
            "limits": sources.limits.model_copy(update={"rounds": 1}),
        }
    )
    store = tmp_path / "store"
    records = tinyrun.work(tiny_review, store, "asked")
    assert records.waiting() is not None
    before = files(aged(store))
    gc(store)
    assert {p: d for p, d in files(store).items() if "/claim/" not in p} == {
        p: d for p, d in before.items() if "/claim/" not in p
    }
    records.answer(0, "stop", "not yet", "ada")
    monkeypatch.setattr(RunStore, "commit_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed when the decision was made and the manifest was not
        tinyrun.work(tiny_review, store, "asked")
    monkeypatch.undo()
    decisions = {path: path.read_bytes() for path in store.glob("steps/decide/*/done.json")}
    assert len(decisions) == 2
    gc(aged(store))
    assert {path: path.read_bytes() for path in store.glob("steps/decide/*/done.json")} == decisions


def test_checkpoints_and_lost_attempts_of_finished_work_go(kept_store):
    step = next(kept_store.glob("steps/train/*/done.json")).parent
    attempt = step / ("a" * 16)
    checkpoint = attempt / "checkpoint-000001" / "weights.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"weights")
    file = {"attempt": "a" * 16, "sha256": "0" * 64, "bytes": 7, "rows": None}
    part = {
        "format": FORMAT,
        "files": {"checkpoint-000001/weights.safetensors": file},
        "info": {"step": 1},
    }
    create_json(
        open_store(str(kept_store)), f"{step.relative_to(kept_store).as_posix()}/part-00000.json", part
    )
    (step / ".done.json.0123456789abcdef").write_bytes(b"half")
    sampled = [path.read_bytes() for path in sorted(kept_store.glob("steps/sample/*/part-*.json"))]
    why = {Path(item["path"]).name: item["why"] for item in gc(aged(kept_store))["items"]}
    assert why["part-00000.json"] == "a checkpoint of a finished step"
    assert why["a" * 16] == "files of an attempt not named in the step's record"
    assert why[".done.json.0123456789abcdef"] == "a temporary file of a killed process"
    assert not attempt.exists() and not (step / "part-00000.json").exists()
    assert (
        [path.read_bytes() for path in sorted(kept_store.glob("steps/sample/*/part-*.json"))] == sampled != []
    )
    assert holds(kept_store, "first") and holds(kept_store, "second")


@pytest.mark.parametrize("done", [False, True], ids=["in training", "once done.json stands"])
def test_checkpoints_that_a_killed_training_left_go_when_it_is_done(tmp_path, monkeypatch, done):
    """Killed amid the deletion of a checkpoint's files; gc leaves what the run needs, and takes the rest."""
    execution = {"checkpoint_steps": 1, "keep_checkpoints": 1, "device": "cpu"}
    settings = {**make_store.SMALL, "train": {"batch": 4}, "limits": {"rounds": 1}, "execution": execution}
    tiny.tiny_policy(tmp_path / "sources" / "policy", layers=1, hidden=32)
    config = tinyrun.config(tmp_path / "sources", **settings)
    expected = tinyrun.policy_shas(tinyrun.work(config, tmp_path / "whole"))
    store, remove = tmp_path / "store", LocalStore.remove

    def until_killed(self, path):
        if (
            path.endswith("rng.safetensors")
            and (store / path).parents[2].joinpath("done.json").exists() == done
        ):
            raise KeyboardInterrupt
        remove(self, path)

    monkeypatch.setattr(LocalStore, "remove", until_killed)
    with pytest.raises(KeyboardInterrupt):
        tinyrun.work(config, store)
    monkeypatch.undo()
    parts = sorted(store.glob("steps/train/*/part-*.json"))
    assert list(store.glob("steps/train/*/*/checkpoint-*/rng.safetensors"))
    gc(aged(store))
    assert sorted(store.glob("steps/train/*/part-*.json")) == ([] if done else parts)
    again = tinyrun.work(config, store)
    assert tinyrun.policy_shas(again) == expected
    assert holds(store, "tiny")
    gc(aged(store))
    assert not [*store.glob("steps/train/*/part-*"), *store.glob("steps/train/*/*/checkpoint-*/*")]
    assert holds(store, "tiny")


def test_a_step_that_is_being_done_is_left_alone(kept_store):
    store = open_store(str(kept_store))
    shutil.rmtree(kept_store / "runs" / "second")
    step = next(path for path in own_of_train(kept_store))
    before = files(aged(kept_store))
    path = claim_path("train", step.name)
    mine = take(store, path, look(store, path))
    collect(store, delete=True, older_than=0.0)
    mine.release()
    assert (step / "done.json").read_bytes() == before[f"steps/train/{step.name}/done.json"]


def own_of_train(store: Path) -> list[Path]:
    """Train steps that only `second` rests on."""
    needed = {ref.key for r in RunStore(open_store(str(store)), "first").rounds() for ref in r.used}
    return [path for path in store.glob("steps/train/*") if path.name not in needed]


def test_while_a_run_is_worked_on_nothing_younger_than_an_hour_goes(kept_store):
    store = open_store(str(kept_store))
    with hold(store, "first", print):
        with pytest.raises(BusyError, match="run 'first' is held by process"):
            collect(store, delete=True, older_than=0.0)
        collect(store, delete=False, older_than=0.0)
        collect(store, delete=True, older_than=3600.0)


def test_a_run_of_a_newer_version_stops_it_before_anything_is_deleted(kept_store):
    shutil.rmtree(kept_store / "runs" / "second")
    (kept_store / "runs" / "newer").mkdir()
    (kept_store / "runs" / "newer" / "run-000.json").write_text(json.dumps({"format": 2, "what": "?"}))
    before = files(aged(kept_store))
    with pytest.raises(StoreError, match=r"written by a newer sera-flow \(format 2,"):
        gc(kept_store)
    assert files(kept_store) == before


def test_notes_of_runs_that_are_no_more_go_and_others_stay(kept_store):
    store = open_store(str(kept_store))
    for number, run in enumerate(("first", "gone")):
        create_json(store, f"finished/{number:064d}.json", {"format": FORMAT, "run": run, "created": "then"})
    gc(aged(kept_store))
    assert store.names("finished") == [f"{0:064d}.json"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("90s", 90), ("1.5h", 5400), ("7d", 7 * DAY), ("2w", 14 * DAY)]
)
def test_ages_are_written_with_their_unit(text, seconds):
    assert garbage.parse_age(text) == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", "１d", "1e9d", ""])
def test_an_age_without_a_unit_or_in_other_digits_is_refused(text):
    with pytest.raises(InputError, match="--older-than"):
        garbage.parse_age(text)


@pytest.mark.flow
def test_the_flow_does_the_same_as_the_command(kept_store, prefect_server):
    from flows.collect_garbage import sera_gc

    shutil.rmtree(aged(kept_store) / "runs" / "second")
    found = sera_gc(str(kept_store), delete=True, older_than="1d")
    assert found["deleted"] and any(item["why"] == garbage.UNNEEDED for item in found["items"])
    assert not (own_of_train(kept_store)[0] / "done.json").exists()
