"""Leases and claims: one writer a run, one worker a long step; nothing but time rests on them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sera_core.artifacts import holder, lease
from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import create_json, open_store
from sera_core.artifacts.upkeep import upkeep
from sera_core.config import ExecutionConfig
from sera_core.errors import BusyError, SeraError, StoreError

HOLD = """
import sys, time
from sera_core.artifacts import lease
from sera_core.artifacts.store import open_store
lease.EXPIRE_SECONDS, lease.BEAT_SECONDS = float(sys.argv[2]), float(sys.argv[2]) / 4
with lease.hold(open_store(sys.argv[1]), "r", print) as mine:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            mine.check()
            print("ours", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def another(store):
    """Another process that holds the run `r`, for as long as it gives signs of life."""
    processes = []

    def start(expire: float = 60.0) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, store.url, str(expire)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def elsewhere(store, run: str = "r", number: int = 0) -> dict:
    """An epoch taken by a process that nothing is known of from here."""
    there = {"token": "beef" * 4, "host": "far", "user": "ada", "pid": 7, "began": "1", "place": "far away"}
    record = {"format": FORMAT, "epoch": number, "holder": there, "since": "2026-01-01T00:00:00+00:00"}
    create_json(store, f"runs/{run}/lease/{number:05d}.json", record)
    return record


def aged(store, path: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(store.root / path, (then, then))


def manifest(run: str = "r", number: int = 0) -> RoundManifest:
    return RoundManifest(
        format=FORMAT, run=run, round=number, config_sha256="0" * 64, parent_sha256=None, steps={}, used=[],
        artifacts={}, pairs={"human": 1, "generated": 0}, target_share=0.0, generated_share=0.0, metrics={},
        decision="promote", reason="", stop_reason=None, accuracy=None, created="",
    )  # fmt: skip


def test_each_holder_takes_the_next_epoch_and_the_round_says_which(store):
    records = RunStore(store, "r")
    for number in range(3):
        with lease.hold(store, "r", print) as mine:
            assert mine.number == number
            committed = records.commit_round(manifest(number=number))
            assert committed.epoch == number
    assert lease.look(store, lease.lease_path("r")).is_over


def test_the_second_is_told_who_holds_the_run_and_since_when(store, another):
    process = another()
    with pytest.raises(BusyError) as refused, lease.hold(store, "r", print):
        pass
    assert refused.value.exit_code == 3
    me = holder.this_process()
    seen = lease.look(store, lease.lease_path("r")).epoch
    for word in (f"process {process.pid}", me.host, me.user, seen.since):
        assert word in str(refused.value)


def test_a_second_holder_in_the_same_process_is_refused_too(store):
    with lease.hold(store, "r", print), pytest.raises(BusyError), lease.hold(store, "r", print):
        pass
    with lease.hold(store, "r", print):
        pass  # the refused one took nothing away


def test_after_a_kill_on_this_machine_the_next_one_takes_over_at_once(store, another):
    process = another()
    process.send_signal(signal.SIGKILL)
    held = lease.look(store, lease.lease_path("r")).epoch.holder
    while holder.is_alive(held):
        time.sleep(0.01)
    assert process.returncode is None  # not reaped: its number is still listed
    began = time.monotonic()
    with lease.hold(store, "r", print) as mine:
        assert mine.number == 1
    assert time.monotonic() - began < 5


def test_a_number_given_to_another_process_since_is_not_the_holder(store):
    us = holder.this_process()
    assert holder.is_alive(us) is True
    assert holder.is_alive(us.model_copy(update={"began": "1"})) is False
    assert holder.is_alive(us.model_copy(update={"place": "another machine"})) is None


def test_a_holder_elsewhere_without_a_sign_of_life_runs_out_in_a_minute_of_the_stores_clock(
    store, monkeypatch
):
    elsewhere(store)
    aged(store, "runs/r/lease/00000.json", 58.5)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the machine's own clock counts for nothing
    told = []
    began = time.monotonic()
    with lease.hold(store, "r", told.append) as mine:
        assert mine.number == 1
    assert 1 < time.monotonic() - began < 30
    assert len(told) == 1 and "process 7 of ada on far" in told[0]


def test_a_lease_from_the_future_runs_out_by_the_clock_of_whoever_waits(store, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)
    record = elsewhere(store)
    beat = {"format": FORMAT, "token": record["holder"]["token"], "beats": 4, "released": False}
    upkeep(store).replace("runs/r/lease/00000-beat.json", lease.canonical_json(beat))
    for name in ("00000", "00000-beat"):
        aged(store, f"runs/r/lease/{name}.json", -1e8)  # a clock that had jumped three years ahead
    began = time.monotonic()
    with lease.hold(store, "r", print) as mine:
        assert mine.number == 1
    assert 0.5 < time.monotonic() - began < 30


def test_a_sign_of_life_from_elsewhere_ends_the_waiting(store, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    record = elsewhere(store)
    beat = {"format": FORMAT, "token": record["holder"]["token"], "beats": 4, "released": False}

    def beat_later():
        time.sleep(0.5)
        upkeep(store).replace("runs/r/lease/00000-beat.json", lease.canonical_json(beat))

    thread = threading.Thread(target=beat_later)
    thread.start()
    with pytest.raises(BusyError, match="process 7 of ada on far"), lease.hold(store, "r", print):
        pass
    thread.join()


def test_beats_keep_a_lease_alive_and_only_the_owner_writes_them(store, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with lease.hold(store, "r", print):
        aged(store, "runs/r/lease/00000.json", 600)
        time.sleep(0.3)
        seen = lease.look(store, lease.lease_path("r"))
        assert seen.beats > 2 and seen.age < 5 and not seen.is_over


def test_a_paused_and_revived_writer_finds_its_epoch_old_and_commits_nothing(store, another):
    process = another(expire=0.4)
    process.send_signal(signal.SIGSTOP)
    path = lease.lease_path("r")
    while lease.look(store, path).age < 0.5:
        time.sleep(0.05)
    successor = lease.take(store, path, lease.look(store, path))
    assert successor.number == 1
    process.send_signal(signal.SIGCONT)
    process.stdin.write("\n")
    process.stdin.flush()
    said = process.stdout.readline()
    assert said.startswith("BusyError") and f"process {os.getpid()}" in said and "commits nothing" in said
    successor.check()  # whom the revived one did not disturb
    successor.release()


def test_a_round_is_not_committed_under_an_epoch_that_is_over(store):
    records = RunStore(store, "r")
    with lease.hold(store, "r", print):
        elsewhere(store, number=1)
        with pytest.raises(BusyError, match=r"process 7 of ada on far took over"):
            records.commit_round(manifest())
        with pytest.raises(BusyError):
            records.record_stop("budget", "")
    assert records.rounds() == []
    assert store.names("runs/r") == ["lease"]


def test_a_writer_that_lost_the_race_for_the_record_stops(store, monkeypatch):
    """The other one took over and committed between our reading of the lease and our writing."""
    records = RunStore(store, "r")
    with lease.hold(store, "r", print) as mine:
        create = store.create

        def be_overtaken(path, data):
            if path.endswith("round-000.json"):
                elsewhere(store, number=1)
                create(path, json.dumps(manifest().model_dump(mode="json")).encode())
            return create(path, data)

        monkeypatch.setattr(store, "create", be_overtaken)
        with pytest.raises(BusyError, match="took over"):
            records.commit_round(manifest())
    assert mine.number == 0 and records.rounds()[0].epoch is None  # the other one's stands


def test_the_newest_of_many_epochs_is_found_in_few_reads(store):
    for number in range(40):
        elsewhere(store, number=number)
    reads = []
    read = store.read_bytes
    store.read_bytes = lambda path: reads.append(path) or read(path)
    assert lease.look(store, lease.lease_path("r")).epoch.epoch == 39
    assert len(reads) < 15


def test_a_lease_written_by_a_newer_version_is_refused_by_name(store):
    create_json(store, "runs/r/lease/00000.json", {"format": FORMAT + 1})
    with pytest.raises(StoreError, match=r"00000\.json: written by a newer sera-flow \(format 2,"):
        lease.look(store, lease.lease_path("r"))


# -------------------------------------------------------------------------------------------------- claims

SPEC = StepSpec(step="train", version=1, fields={"n": 1}, inputs={})


def do(store, work, tell=print):
    with lease.claim(store, SPEC, tell) as record:
        return record or run_step(store, SPEC, work, ExecutionConfig())


def test_of_two_that_need_a_step_one_does_it_and_the_other_gets_the_record(store, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    began, told, done = threading.Event(), [], []

    def work(attempt):
        done.append(1)
        began.set()
        time.sleep(0.6)
        attempt.write("a.txt").write_text("a")
        return ["a.txt"]

    first = threading.Thread(target=lambda: do(store, work))
    first.start()
    began.wait(10)
    record = do(store, work, told.append)
    first.join()
    assert len(done) == 1 and list(record.files) == ["a.txt"]
    assert len(told) == 1 and f"process {os.getpid()}" in told[0] and "waiting for its record" in told[0]


def test_a_claim_is_given_up_by_work_that_failed(store):
    def fail(attempt):
        raise SeraError("no")

    def work(attempt):
        attempt.write("a.txt").write_text("a")
        return ["a.txt"]

    with pytest.raises(SeraError, match="no"):
        do(store, fail)
    began = time.monotonic()
    assert do(store, work).counts == {}
    assert time.monotonic() - began < 2


def test_a_claim_that_runs_out_is_taken_over(store, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    there = {"token": "beef" * 4, "host": "far", "user": "ada", "pid": 7, "began": "1", "place": "far away"}
    path = lease.claim_path(SPEC.step, SPEC.key)
    create_json(store, f"{path}/00000.json", {"format": FORMAT, "epoch": 0, "holder": there, "since": "then"})
    aged(store, f"{path}/00000.json", 59.5)
    with lease.claim(store, SPEC, print) as record:
        assert record is None
        assert lease.look(store, path).epoch.epoch == 1


def test_a_claim_from_the_future_is_taken_over_too(store, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.5)
    there = {"token": "beef" * 4, "host": "far", "user": "ada", "pid": 7, "began": "1", "place": "far away"}
    path = lease.claim_path(SPEC.step, SPEC.key)
    create_json(store, f"{path}/00000.json", {"format": FORMAT, "epoch": 0, "holder": there, "since": "then"})
    aged(store, f"{path}/00000.json", -1e8)
    with lease.claim(store, SPEC, print) as record:
        assert record is None and lease.look(store, path).epoch.epoch == 1


def test_a_step_that_moves_nothing_costs_the_store_at_most_50_ms(store):
    seconds = []
    for number in range(15):
        spec = SPEC.model_copy(update={"fields": {"n": number}})
        began = time.monotonic()
        with lease.claim(store, spec, print):
            run_step(store, spec, lambda attempt: [], ExecutionConfig())
        seconds.append(time.monotonic() - began)
    assert sorted(seconds)[len(seconds) // 2] <= 0.05, seconds
