"""`sera watch`: what a run does, seen from beside it."""

import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
import tinyrun

from flows.commands import watch
from flows.display import watched
from flows.display.watched import Watcher
from sera_core.artifacts import lease
from sera_core.artifacts.doing import Doing, Task
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store

RUN = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import tinyrun
from sera_core.artifacts import lease
lease.BEAT_SECONDS, lease.STEP_SECONDS = 0.1, 0.02
tinyrun.work(tinyrun.config(pathlib.Path(sys.argv[2]), limits={"rounds": 1}), sys.argv[3])
"""
HERE = tinyrun.__file__.rsplit("/", 1)[0]


@pytest.fixture
def running(tmp_path):
    """Starts a real run of the tiny policy in a process of its own."""
    processes = []
    tinyrun.config(tmp_path)  # the policy and the pairs

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, HERE, str(tmp_path), str(tmp_path / "store")]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        records = RunStore(open_store(str(tmp_path / "store")), "tiny")
        while not records.configs():
            assert processes[-1].poll() is None
            time.sleep(0.05)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def watcher(store) -> Watcher:
    return Watcher(RunStore(open_store(str(store)), "tiny"))


@pytest.mark.slow
def test_a_run_is_watched_killed_and_watched_to_its_end(tmp_path, running, sera, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    store = tmp_path / "store"
    first = running()
    following = watcher(store)
    while (seen := following.look()).doing is None or seen.doing.round != 0:
        assert first.poll() is None
        time.sleep(0.1)
    assert seen.state == "working" and seen.rounds == []
    first.send_signal(signal.SIGKILL)
    first.wait()

    left = sera("watch", "tiny", "--store", store, "--json").json
    assert (left["state"], left["round"], left["limit_rounds"]) == ("idle", 0, 1)
    assert f"process {first.pid} of" in left["holder"]
    said = " ".join(sera("watch", "tiny", "--store", store, "--once").out.split())
    assert (
        "Nobody works on run tiny" in said and "is gone without an end, last at round 0 of at most 1" in said
    )
    assert f"sera run EXPERIMENT.toml --name tiny --store {store}" in said

    second = running()
    lines = sera("watch", "tiny", "--store", store).out.splitlines()
    assert second.wait() == 0
    assert sum(line.startswith("round 0: promote, 24 human") for line in lines) == 1
    assert any(line.startswith("round 0 of at most 1: ") for line in lines)
    assert lines[-1].startswith("The run stopped with `max_rounds`")
    done = sera("watch", "tiny", "--store", store, "--json").json
    assert (done["state"], done["stop_reason"], len(done["rounds"])) == ("stopped", "max_rounds", 1)
    assert done["step"] is None and done["rounds"][0]["metrics"]["heldout/rewards/accuracies"]["n"] == 8


def test_progress_of_training_reaches_the_store_with_the_heartbeats_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(lease, "STEP_SECONDS", 0.05)
    store = open_store(str(tmp_path / "store"))
    written = []
    told = lease.Lease._tell
    monkeypatch.setattr(
        lease.Lease, "_tell", lambda self, task: (written.append(task.last), told(self, task))
    )
    with lease.hold(store, "r", print) as mine:
        mine.begin(Task("train", 1, 2.5))
        began = time.monotonic()
        while (passed := time.monotonic() - began) < 1.0:
            mine.report(int(64 * passed), 64, "pairs")
        said = watched.read_doing(store, "runs/r/lease", mine.number, mine.epoch.holder.token)
        assert (said.step, said.round, said.total, said.unit, said.spent) == ("train", 1, 64, "pairs", 2.5)
        assert 30 < said.done < 64
        assert said.left == pytest.approx(1.0 - said.done / 64, abs=0.3)
    assert 3 <= len(written) <= 6  # one as the step began, one with each heartbeat, one at the end
    beat = json.loads((tmp_path / "store/runs/r/lease/00000-beat.json").read_text())
    assert set(beat) == {"format", "token", "beats", "released"}  # all that earlier versions allow


def test_the_pace_of_a_resumed_step_does_not_count_what_was_done_before(monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    task = Task("logps", 0, 0.0)
    task.report(80, 100, "responses")
    assert task._left() is None
    task.report(90, 100, "responses")
    assert task.record("t").left == 10.0  # ten in ten seconds, and ten to go


def test_the_time_left_of_a_run_counts_the_rounds_that_the_limits_allow(kept_store):
    rounds = RunStore(open_store(str(kept_store)), "first").rounds()
    assert rounds[1].metrics["seconds"] == 5.59
    now = Doing(format=FORMAT, token="t", round=2, step="train", seconds=1.0, spent=2.0)
    assert watched.seconds_left(rounds, 5, now) == pytest.approx(5.59 - 3 + 2 * 5.59, abs=0.06)
    assert watched.seconds_left(rounds[:1], 5, now) is None  # round 0 reviews and samples nothing
    slow = now.model_copy(update={"seconds": 100.0})
    assert watched.seconds_left(rounds, 3, slow) == 0.0


def question(store, hours: float) -> None:
    """Round 1 of the kept run as it was before its decision: a person is asked."""
    (store / "runs" / "first" / "round-001.json").unlink()
    until = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    asked = {"format": FORMAT, "round": 1, "evidence": {}, "until": until, "default": "hold"}
    (store / "runs" / "first" / "review-001.json").write_text(json.dumps(asked))


def test_a_run_that_waits_for_a_review_ends_the_watch_and_says_how_to_answer(kept_store, sera):
    question(kept_store, 2)
    said = sera("watch", "first", "--store", kept_store).out
    assert "waiting for a review of round 1 until" in said and "sera review first --decision promote" in said
    assert sera("watch", "first", "--store", kept_store, "--json").json["waiting"]["default"] == "hold"


def test_a_watch_answers_no_review_whose_deadline_has_passed(kept_store, sera):
    question(kept_store, -2)
    assert "its default counts (hold)" in sera("watch", "first", "--store", kept_store).out
    assert not (kept_store / "runs" / "first" / "review-001-answer.json").exists()


def test_a_run_that_nobody_continues_ends_the_watch_with_exit_code_1(kept_store, sera, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(watch, "GONE_SECONDS", 0.2)
    (kept_store / "runs" / "first" / "round-001.json").unlink()
    said = sera("watch", "first", "--store", kept_store, code=1)
    assert said.out.count("Nobody works on run first") == 1 and "has ended" in said.out
    assert "nobody has worked on it" in said.err


def test_a_stopped_run_is_told_and_an_unknown_one_refused(kept_store, sera):
    assert "The run stopped with `max_rounds`" in sera("watch", "first", "--store", kept_store).out
    assert "not in the store" in sera("watch", "nobody", "--store", kept_store, code=2).err


def test_what_an_epoch_before_said_is_not_what_its_successor_does(tmp_path):
    store = open_store(str(tmp_path / "store"))
    with lease.hold(store, "tiny", print) as mine:
        mine.begin(Task("train", 3, 0.0))
    assert (tmp_path / "store/runs/tiny/lease/00000-doing.json").exists()
    with lease.hold(store, "tiny", print) as mine:
        held = lease.look(store, "runs/tiny/lease")
        assert watcher(tmp_path / "store")._doing(held) is None
