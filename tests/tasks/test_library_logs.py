"""Log lines of the libraries reach who listens to them, and nobody else notices."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tinyrun

from sera_core.artifacts.manifest import StepSpec
from sera_core.config import ExecutionConfig
from tasks.engines.library_logs import forward_library_logs, is_forwarded
from tasks.step_functions import WORK, do_work
from tasks.training import hide_library_notices

VLLM = """
import logging
from tasks.engines.library_logs import forward_library_logs

class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

lines = []
with forward_library_logs(Kept()):
    from vllm.logger import init_logger
    init_logger("vllm.engine").info("%s blocks", 12)
assert "12 blocks" in lines, lines
"""


class Kept(logging.Handler):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.getMessage()))


def say_something() -> None:
    for name in ("trl.trainer", "vllm.engine", "sera.train", "transformers.modeling"):
        logging.getLogger(name).info("told")
        logging.getLogger(name).warning("warned")


def test_a_listener_hears_the_libraries_while_the_block_runs_and_not_after():
    kept, before = Kept(), os.environ.get("VLLM_CONFIGURE_LOGGING")
    with forward_library_logs(kept):
        say_something()
    heard = list(kept.lines)
    say_something()
    assert kept.lines == heard
    assert {name for name, said in heard if said == "told"} == {"trl.trainer", "vllm.engine", "sera.train"}
    assert sum(said == "warned" for _, said in heard) == 4
    assert os.environ.get("VLLM_CONFIGURE_LOGGING") == before


def test_a_library_that_is_heard_already_is_not_heard_twice():
    first, second = Kept(), Kept()
    logging.getLogger("trl").addHandler(first)
    try:
        with forward_library_logs(second):
            logging.getLogger("trl.trainer").warning("inside")
        logging.getLogger("trl.trainer").warning("after")
    finally:
        logging.getLogger("trl").removeHandler(first)
    assert second.lines == [("trl.trainer", "inside")] and first.lines == [("trl.trainer", "after")]


def test_training_hushes_a_library_only_while_nobody_listens():
    with hide_library_notices():
        assert logging.getLogger("trl").level == logging.ERROR
    kept = Kept()
    with forward_library_logs(kept), hide_library_notices():
        assert is_forwarded("trl")
        logging.getLogger("trl.trainer").info("told")
    assert kept.lines == [("trl.trainer", "told")] and not is_forwarded("trl")


def test_a_listener_hears_each_optimizer_step_with_the_metrics_of_trl(tmp_path):
    kept = Kept()
    with forward_library_logs(kept):
        records = tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), tmp_path / "store")
    steps = [said for name, said in kept.lines if name == "sera.train"]
    assert len(steps) == records.rounds()[0].metrics["steps"] == 3
    assert steps[0].startswith("step 1 of 3: ") and "loss 0.69" in steps[0] and "rewards/margins" in steps[0]


SPEAKING = """
import logging

def speak(attempt):
    logging.getLogger("trl.trainer").info("told")
    attempt.write("said.txt").write_text(str(attempt.fields))
    return ["said.txt"]
"""


@pytest.mark.slow
def test_a_child_says_more_to_a_log_of_ones_own_than_to_a_terminal(tmp_path, monkeypatch, capfd):
    (tmp_path / "speaking.py").write_text(SPEAKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(WORK, "logps", "speaking:speak")
    execution = ExecutionConfig(device="cpu", child="always")

    def do(number, *log):
        spec = StepSpec(step="logps", version=1, fields={"number": number}, inputs={})
        do_work(str(tmp_path / "store"), spec, execution, lambda *_: None, *log)

    lines: list[str] = []
    do(1, lines.append)
    assert "trl.trainer: told" in lines
    do(2)
    assert "told" not in "".join(capfd.readouterr())


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_listener_survives_the_import_of_vllm():
    done = subprocess.run([sys.executable, "-c", VLLM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
