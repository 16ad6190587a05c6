"""Work in a child process group: the same result, every error by name, and nothing left running."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import tinyrun

from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.config import ExecutionConfig, SeraConfig
from sera_core.errors import BudgetReached, InputError, SeraError
from tasks.engines.child_process import keep_process
from tasks.engines.fork_server import end_server
from tasks.step_functions import NOTHING, WORK, do_work, in_child

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
WHERE = {"child": "always", "here": "never"}

PARENT = """
import signal, sys
import tasks.step_functions as work
from sera_core.artifacts.manifest import StepSpec
from sera_core.config import ExecutionConfig

class Terminated(BaseException):
    pass

def terminate(*_):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
signal.signal(signal.SIGINT, signal.default_int_handler)
place, name, holds, deaf = sys.argv[1:]
work.WORK["logps"] = f"childwork:{name}"
fields = {"holds": holds == "True", "deaf": deaf == "True"}
spec = StepSpec(step="logps", version=1, fields=fields, inputs={}, where={"place": place})
work.do_work(place + "/store", spec, ExecutionConfig(device="cpu", child="always"))
"""


class Doing:
    """A step that does one of the functions of childwork.py, in a store of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.store = str(folder / "store")
        self.told: list[tuple[int, int, str]] = []
        self.log: list[str] = []

    def __call__(
        self, name: str, child: str = "always", module: str = "childwork", **fields: object
    ) -> StepRecord:
        self.monkeypatch.setitem(WORK, "logps", f"{module}:{name}")
        spec = StepSpec(step="logps", version=1, fields=fields, inputs={}, where={"place": str(self.folder)})
        execution = ExecutionConfig.model_validate({"device": "cpu", "child": child})
        return do_work(self.store, spec, execution, lambda *report: self.told.append(report), self.log.append)


@pytest.fixture
def do(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    return Doing(tmp_path, monkeypatch)


def members(group: int) -> list[str]:
    """Living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, IndexError):
            continue
        if state[0] not in "ZX" and int(state[2]) == group:
            found.append(f"{entry.name} {' '.join(words)}")
    return found


def gone_within(seconds: float, group: int) -> None:
    deadline = time.monotonic() + seconds
    while left := members(group):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def group_in(folder: Path, parent: subprocess.Popen | None = None) -> int:
    """The group of the work, once it has started its own process."""
    deadline = time.monotonic() + 60
    while not (folder / "group").exists():
        assert time.monotonic() < deadline and (parent is None or parent.poll() is None)
        time.sleep(0.05)
    return int((folder / "group").read_text())


def start_parent(folder: Path, name: str, holds: bool = False, deaf: bool = False) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), name, str(holds), str(deaf)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"},
        stderr=subprocess.PIPE,
        text=True,
    )


# ------------------------------------------------------------------------------------------------ the result


def two_rounds(folder: Path, child: str) -> SeraConfig:
    few = {"evaluate": {"prompts": 0}, "limits": {"rounds": 2}}  # a child takes seconds to import torch
    return tinyrun.config(folder, execution={"child": child}, **few)


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("child")
    with keep_process():
        return {child: tinyrun.work(two_rounds(folder, child), folder / child) for child in WHERE.values()}


def test_a_child_gives_the_bytes_of_work_done_here(tiny_runs):
    here, apart = tiny_runs["never"], tiny_runs["always"]
    assert len(tinyrun.policy_shas(here)) == 2
    assert tinyrun.policy_shas(apart) == tinyrun.policy_shas(here)
    for one, other in zip(here.rounds(), apart.rounds(), strict=True):
        assert one.artifacts == other.artifacts


def test_steps_done_in_children_are_found_by_work_done_here(tiny_runs):
    apart = tiny_runs["always"]
    root = Path(apart.store.url)
    before = {path: path.stat().st_mtime_ns for path in (root / "steps").rglob("done.json")}
    for path in (root / "runs" / "tiny").glob("round-*.json"):
        path.unlink()
    again = tinyrun.work(two_rounds(root.parent, "never"), root)
    assert tinyrun.policy_shas(again) == tinyrun.policy_shas(tiny_runs["never"])
    assert {path: path.stat().st_mtime_ns for path in (root / "steps").rglob("done.json")} == before


@pytest.mark.parametrize("child", WHERE.values(), ids=WHERE.keys())
def test_progress_and_the_record_come_back(do, child):
    fields = {"least": float("-inf"), "many": [1, 2.5], "none": None, "text": "π → ½"}
    record = do("speak", child, **fields)
    assert do.told == [(1, 3, "words"), (2, 3, "words"), (3, 3, "words")]
    path = Path(do.store) / "steps" / "logps" / record.key / record.files["said.txt"].attempt / "said.txt"
    assert path.read_text() == repr(fields)
    assert do("break_down", child, **fields) == record  # found: no work, no child


def test_output_comes_line_by_line_as_a_terminal_would_leave_it(do):
    do("speak")
    assert do.log == ["first line", "bar 3", "no end of line"]


def test_a_child_uses_as_many_threads_as_this_process(do):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        assert do("count_threads").metrics["threads"] == before + 2
    finally:
        torch.set_num_threads(before)


def test_a_cpu_works_here_unless_told_otherwise():
    def choice(**settings: str) -> bool:
        return in_child(ExecutionConfig.model_validate(settings))

    assert not choice(device="cpu") and choice(device="cuda")
    assert choice(device="cpu", child="always") and not choice(device="cuda", child="never")


def test_a_folder_named_tasks_where_the_command_was_given_is_not_ours(do, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('shadowed')")
    do.monkeypatch.chdir(tmp_path)
    assert do("speak").step == "logps"


# ------------------------------------------------------------------------------------------- the fork server


@pytest.fixture
def described(do):
    """What a step's process says about itself."""
    count = itertools.count()

    def describe(module: str = "childwork") -> dict:
        record = do("describe_process", module=module, number=next(count))
        path = Path(do.store) / "steps" / "logps" / record.key / record.files["said.txt"].attempt / "said.txt"
        return json.loads(path.read_text())

    return describe


def test_steps_are_forked_from_one_server_that_has_imported_the_libraries(described):
    first, second = described(), described()
    assert first["torch"] and first["module"] == "tasks.engines.fork_server"
    assert first["parent"] == second["parent"] != os.getpid()


def test_a_step_sees_the_environment_and_the_directory_of_now(described, monkeypatch, tmp_path):
    before = described()
    monkeypatch.setenv("SERA_TEST_WORD", "one")
    monkeypatch.chdir(tmp_path)
    same_server = described()
    assert same_server == {**before, "SERA_TEST_WORD": "one", "directory": str(tmp_path)}
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert described() == {**same_server, "directory": "/"}
    monkeypatch.setenv("TEST_WORD", "two")  # a library could have read it when it was imported
    new_server = described()
    assert new_server["TEST_WORD"] == "two" and new_server["parent"] != before["parent"]
    assert not Path(f"/proc/{before['parent']}").exists()


def test_a_killed_server_fails_the_step_that_runs_and_the_next_one_starts_another(do, described):
    server = described()["parent"]

    def kill_it() -> None:
        group_in(do.folder)
        os.kill(server, signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    with pytest.raises(SeraError, match="ended by signal 9"):
        do("wait_with_a_grandchild", holds=False, deaf=True)
    killer.join()
    gone_within(5, group_in(do.folder))
    assert described()["parent"] != server


def test_where_an_import_opened_a_gpu_the_step_gets_a_new_interpreter(described):
    assert described("openedgpu")["module"] == "tasks.engines.child_step"
    end_server()  # the next test's server has not opened a GPU


def test_an_interruption_while_the_server_imports_leaves_nothing(tmp_path):
    parent = start_parent(tmp_path, "wait_with_a_grandchild", deaf=True)
    while not (servers := servers_of(parent.pid)):
        time.sleep(0.01)
    parent.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in parent.communicate(timeout=20)[1]
    gone_within(5, servers[0])
    assert not (tmp_path / "group").exists()


def servers_of(parent: int) -> list[int]:
    """The fork servers that a process has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if "fork_server" in Path(f"/proc/{pid}/cmdline").read_text()]


# ------------------------------------------------------------------------------- the process that is kept


@pytest.fixture
def pid_of(do):
    """The process that a step runs in, by what it prints."""
    count = itertools.count()

    def ran_in(step: str = "logps", device: AbstractContextManager[None] = NOTHING, **fields: object) -> int:
        do.monkeypatch.setitem(WORK, step, "childwork:print_pid")
        given = {"number": next(count), **fields}
        spec = StepSpec(step=step, version=1, fields=given, inputs={}, where={"place": str(do.folder)})
        log: list[str] = []
        do_work(do.store, spec, ExecutionConfig(device="cpu", child="always"), log=log.append, device=device)
        assert log[1:] == ["first line", "bar 3", "no end of line"]
        return int(log[0])

    return ran_in


def test_steps_that_only_read_a_policy_share_a_process_that_ends_with_the_block(pid_of):
    with keep_process():
        first = pid_of("logps")
        assert pid_of("sample", engine="transformers") == pid_of("evaluate") == first
        assert len(members(first)) == 2  # it waits, and its guard
    gone_within(5, first)
    assert pid_of("logps") != pid_of("logps")  # outside the block


@pytest.mark.parametrize(("step", "fields"), [("train", {}), ("rate", {}), ("sample", {"engine": "vllm"})])
def test_other_steps_have_the_memory_for_themselves(pid_of, step, fields):
    with keep_process():
        first = pid_of("logps")
        other = pid_of(step, **fields)
        gone_within(0.1, first)
        gone_within(0.1, other)
        assert len({first, other, pid_of("logps")}) == 3


def test_a_step_that_holds_a_slot_of_the_device_keeps_no_process_after_it(pid_of):
    with keep_process():
        held = pid_of("logps", device=nullcontext())
        gone_within(0.1, held)


def test_a_kept_process_is_not_used_in_another_environment_or_once_it_is_dead(pid_of, monkeypatch, tmp_path):
    with keep_process():
        first = pid_of()
        monkeypatch.setenv("SERA_TEST_WORD", "one")
        second = pid_of()
        monkeypatch.chdir(tmp_path)
        third = pid_of()
        os.killpg(third, signal.SIGKILL)
        gone_within(5, third)
        assert len({first, second, third, pid_of()}) == 4


def test_after_a_failed_step_the_next_one_gets_another_process(do, pid_of):
    with keep_process():
        first = pid_of()
        with pytest.raises(InputError, match="told to fail"):
            do("print_pid", fails=True)
        assert do.log == [str(first)]
        assert pid_of() != first


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("child", WHERE.values(), ids=WHERE.keys())
@pytest.mark.parametrize(
    ("name", "kind", "code", "message"),
    [
        ("refuse", InputError, 2, "row 17: chosen and rejected are the same text; drop it"),
        ("reach_a_limit", BudgetReached, 0, "12 tokens: limits.tokens = 10"),
    ],
)
def test_an_error_of_ours_comes_back_as_itself(do, child, name, kind, code, message):
    with pytest.raises(SeraError) as raised:
        do(name, child)
    assert type(raised.value) is kind
    assert (raised.value.exit_code, str(raised.value)) == (code, message)
    assert do.log == []


def test_a_bug_is_named_and_its_traceback_is_in_the_log(do):
    with pytest.raises(SeraError, match="step logps: ZeroDivisionError: by nothing") as raised:
        do("break_down")
    assert type(raised.value) is SeraError
    assert any("in break_down" in line for line in do.log)


def test_a_killed_child_is_named_and_the_next_attempt_goes_on_from_its_parts(do):
    with pytest.raises(SeraError, match=r"ended by signal 9 \(killed, perhaps out of memory\)") as raised:
        do("die_after_a_part")
    assert "continue from the last finished part" in str(raised.value)
    first = Path(next(Path(do.store).rglob("part-00000.json"))).read_text()
    record = do("die_after_a_part")
    assert record.parts == ["part-00000.json"]
    assert record.files["whole.txt"].attempt not in first


def test_a_child_that_leaves_without_a_word_is_named(do):
    with pytest.raises(SeraError, match="ended with exit code 7"):
        do("exit_early")


def test_a_step_whose_record_is_written_is_done_however_its_process_ends(do):
    assert do("die_when_done").step == "logps"


# --------------------------------------------------------------------------------------- nothing left running


@pytest.mark.parametrize("holds", [False, True], ids=["listening", "holding the interpreter"])
def test_when_the_parent_is_killed_the_whole_group_goes(tmp_path, holds):
    parent = start_parent(tmp_path, "wait_with_a_grandchild", holds=holds, deaf=True)
    group = group_in(tmp_path, parent)
    assert len(members(group)) == 3  # the work, its guard, the grandchild
    (server,) = servers_of(parent.pid)
    parent.kill()
    gone_within(5, group)
    gone_within(5, server)
    parent.communicate(timeout=10)


def test_when_the_child_is_killed_what_it_had_started_goes_too(tmp_path):
    parent = start_parent(tmp_path, "wait_with_a_grandchild", deaf=True)
    group = group_in(tmp_path, parent)
    os.kill(group, signal.SIGKILL)  # its leader alone
    gone_within(5, group)
    assert "ended by signal 9" in parent.communicate(timeout=10)[1]


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")]
)
def test_an_interrupted_parent_lets_the_work_clean_up_and_ends_the_group(tmp_path, number, said):
    parent = start_parent(tmp_path, "wait_with_a_grandchild")
    group = group_in(tmp_path, parent)
    started = time.monotonic()
    parent.send_signal(number)
    assert said in parent.communicate(timeout=20)[1]
    assert time.monotonic() - started < 4
    assert not members(group)
    assert (tmp_path / "cleaned").exists()


def test_a_group_that_does_not_listen_is_killed_after_five_seconds(tmp_path):
    parent = start_parent(tmp_path, "wait_with_a_grandchild", holds=True, deaf=True)
    group = group_in(tmp_path, parent)
    started = time.monotonic()
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=20)
    assert 4 < time.monotonic() - started < 9
    assert not members(group)


def test_what_a_finished_child_leaves_behind_is_ended(do):
    started = time.monotonic()
    assert do("leave_a_grandchild").step == "logps"
    assert time.monotonic() - started < 15
    gone_within(1, group_in(do.folder))


def test_a_finished_child_that_does_not_leave_is_ended(do):
    do.monkeypatch.setattr("tasks.engines.child.LEAVE_SECONDS", 1)
    started = time.monotonic()
    assert do("stay").step == "logps"
    assert time.monotonic() - started < 15


# ------------------------------------------------------------------------------------------------ heartbeats


@pytest.mark.parametrize(("child", "stops"), [("never", True), ("always", False)], ids=["here", "child"])
def test_only_work_done_here_can_stop_a_heartbeat(do, child, stops):
    beats, over = [time.monotonic()], threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            beats.append(time.monotonic())

    heart = threading.Thread(target=beat)
    heart.start()
    do("hold_the_interpreter", child)
    over.set()
    heart.join()
    longest = max(after - before for before, after in pairwise([*beats, time.monotonic()]))
    assert longest > 2.5 if stops else longest < 1.5
