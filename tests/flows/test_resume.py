"""A killed command resumes to the same end (reliability/: at any commit point) and leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tinyrun
from commandline import SERA, process

from flows.store_tools.verify import verify

pytestmark = pytest.mark.flow

TESTS = Path(__file__).parents[1]
KILLER = """
import os, signal, sys
from tasks import step_functions
point, round, args = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
if point == "train:2":
    step_functions.WORK["train"] = "childwork:train_and_wait"  # it outlives its parent
def die():
    os.kill(os.getpid(), signal.SIGKILL)
name, calls = point.split(":")
real = step_functions.do_work
def do_work(store, spec, execution, progress, *log):
    seen = []
    def report(done, total, unit):
        seen.append(done)
        if spec.step == name and spec.fields.get("round") == round and len(seen) >= int(calls):
            die()
    return real(store, spec, execution, report, *log)
step_functions.do_work = do_work
from flows.cli import main
sys.exit(main(args))
"""


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    records = tinyrun.work(tinyrun.config(folder, limits={"rounds": 2}), folder / "whole")
    return folder, tinyrun.policy_shas(records)


IN_CHILDREN = {"execution": {"child": "always"}}


@pytest.mark.parametrize(
    ("point", "sections"),
    [("sample:1", {}), ("train:2", IN_CHILDREN)],
    ids=["sample", "train in a child"],
)
def test_a_killed_run_resumes_to_the_policy_of_one_never_killed(never_killed, tmp_path, point, sections):
    folder, expected = never_killed
    store = tmp_path / "store"
    experiment = tinyrun.experiment(folder, limits={"rounds": 2}, **sections)
    command = ["run", str(experiment), "--store", str(store), "--json"]
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLER, point, "1", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )
    _, said = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, said
    assert len(list((store / "runs" / "tiny").glob("round-*.json"))) == 1
    gone_within(5, killed.pid)
    kept = (path for path in store.rglob("*") if path.is_file() and "/checkpoint-" not in str(path))
    before = {path: path.read_bytes() for path in kept}
    again = process(*command)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert [r["artifacts"]["policy"]["sha256"] for r in found["rounds"]] == expected
    assert {path: path.read_bytes() for path in before} == before  # nothing committed was changed
    records = tinyrun.RunStore(tinyrun.open_store(str(store)), "tiny")
    assert verify(records).files > 0
    if point == "train:2":
        step = store / "steps" / "train" / records.rounds()[1].steps["policy"].key
        first = json.loads((step / "part-00000.json").read_text())
        done = json.loads((step / "done.json").read_text())
        attempts = [{file["attempt"] for file in record["files"].values()} for record in (first, done)]
        assert attempts[0] != attempts[1]  # the second attempt went on from the first one's checkpoint


def gone_within(seconds: float, pid: int) -> None:
    """No process whose command line names the killed one as its parent is left."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not (left := children_of(pid)):
            return
        time.sleep(0.2)
    raise AssertionError(f"still running: {left}")


OURS = {"flows.orchestration.embedded_server", "tasks.engines.fork_server"}


def children_of(pid: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if state[0] != "Z" and (int(state[1]) == pid or (OURS.intersection(words) and str(pid) in words)):
            found.append(" ".join(words))
    return found


def test_a_killed_run_leaves_no_process(tmp_path):
    experiment = tinyrun.experiment(tmp_path)
    command = [*SERA, "run", str(experiment), "--store", str(tmp_path / "store")]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 300
    while not (tmp_path / "store" / "steps" / "train").exists() and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.2)
    assert any("embedded_server" in line for line in children_of(run.pid))
    run.kill()
    gone_within(5, run.pid)
    assert run.communicate(timeout=10) is not None  # nobody holds the output pipe


def test_the_same_configuration_gives_the_same_bytes(never_killed):
    folder, expected = never_killed
    records = tinyrun.work(tinyrun.config(folder, limits={"rounds": 2}), folder / "again")
    assert tinyrun.policy_shas(records) == expected
    whole = tinyrun.RunStore(tinyrun.open_store(str(folder / "whole")), "tiny")
    for one, other in zip(whole.rounds(), records.rounds(), strict=True):
        assert one.artifacts == other.artifacts


def test_a_lost_step_is_redone_and_the_rest_is_reused(never_killed):
    folder, expected = never_killed
    records = tinyrun.RunStore(tinyrun.open_store(str(folder / "again")), "tiny")
    tinyrun.work(tinyrun.config(folder, limits={"rounds": 2}), folder / "again")
    lost = records.rounds()[1].steps["mixture"]
    (folder / "again" / "steps" / "mix" / lost.key / "done.json").unlink()
    for name in ("round-001.json",):
        (folder / "again" / "runs" / "tiny" / name).unlink()
    times = {p: p.stat().st_mtime_ns for p in (folder / "again" / "steps").rglob("done.json")}
    tinyrun.work(tinyrun.config(folder, limits={"rounds": 2}), folder / "again")
    assert tinyrun.policy_shas(records) == expected
    assert all(p.stat().st_mtime_ns == then for p, then in times.items())
