"""One at a time, by the command line, by Prefect, and between runs that share steps."""

import subprocess
import sys
import time

import pytest
import tinyrun
from commandline import process

from sera_core.artifacts.lease import hold
from sera_core.artifacts.store import open_store
from sera_core.errors import BusyError

TWO_RUNS = """
import sys
sys.path.insert(0, sys.argv[1])
import pathlib, tinyrun
tinyrun.work(tinyrun.config(pathlib.Path(sys.argv[2]), limits={"rounds": 1}), sys.argv[3], sys.argv[4])
"""
HOLD = """
import sys
from sera_core.artifacts.lease import hold
from sera_core.artifacts.store import open_store
with hold(open_store(sys.argv[1]), "tiny", print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_sera_run_of_the_same_run_says_who_holds_it_and_exits_3(tmp_path):
    experiment, store = tinyrun.experiment(tmp_path), str(tmp_path / "store")
    with hold(open_store(store), "tiny", print) as mine:
        began = time.monotonic()
        refused = process("run", experiment, "--store", store, "--set", "limits.rounds=9")
        assert time.monotonic() - began < 60
    assert refused.returncode == 3, refused.stderr
    held = mine.epoch.holder
    for word in (f"process {held.pid}", held.host, held.user, mine.epoch.since):
        assert word in refused.stderr
    assert open_store(store).names("runs/tiny") == ["lease"]  # a changed setting was not recorded either


@pytest.mark.flow
def test_the_flow_itself_does_no_work_on_a_run_that_another_process_holds(tmp_path, prefect_server):
    from flows.sera import sera as flow

    store = str(tmp_path / "store")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {other.pid}"):
            flow(tinyrun.form(tmp_path), run="tiny", store=store)
    finally:
        other.kill()
        other.communicate()
    assert not (tmp_path / "store" / "steps" / "logps").exists()


@pytest.mark.slow
def test_two_runs_at_the_same_time_do_each_long_step_once(tmp_path):
    store = tmp_path / "store"
    tinyrun.config(tmp_path)  # the policy and the pairs, before two make them at once
    here = tinyrun.__file__.rsplit("/", 1)[0]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RUNS, here, str(tmp_path), str(store), name], stderr=subprocess.PIPE
        )
        for name in ("one", "two")
    ]
    for one in both:
        _, said = one.communicate(timeout=300)
        assert one.returncode == 0, said.decode()
    for step in ("train", "sample", "logps"):
        for folder in (store / "steps" / step).iterdir():
            attempts = [path for path in folder.iterdir() if path.is_dir() and path.name != "claim"]
            assert len(attempts) == 1, folder
    one, two = (tinyrun.RunStore(open_store(str(store)), name) for name in ("one", "two"))
    assert tinyrun.policy_shas(one) == tinyrun.policy_shas(two) != []
