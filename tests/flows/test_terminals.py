"""What commands write to: terminals narrow and wide, readers that go away, streams that are closed."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.commands.tables import print_table

REPOSITORY = Path(__file__).parents[2]
SERA = [sys.executable, "-P", "-m", "flows.start"]
TABLES = {
    "list": (["list"], ["run: first", "rounds: 2"]),
    "show": (["show", "first"], ["round: 1", "decision:", "held-out accuracy:"]),
    "round": (["show", "first", "--round", "1"], ["heldout/margin: ", "role: policy", "sha256: "]),
}


def on_terminal(args, columns, cwd=REPOSITORY):
    """Exit code and output of a command on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*SERA, *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": str(columns), "TERM": "xterm"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # the command has closed the terminal
            break
        if not data:
            break
        said += data
    os.close(ours)
    return process.wait(60), said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name", TABLES)
def test_a_narrow_terminal_gets_a_list_with_every_value(kept_store, name):
    args, expected = TABLES[name]
    code, said = on_terminal([*args, "--store", str(kept_store)], 20)
    assert code == 0 and not re.search("[┃│┏━]", said)
    for line in expected:
        assert f"  {line}" in said


def test_a_wide_terminal_and_a_pipe_get_a_table(kept_store, capsys):
    code, said = on_terminal(["list", "--store", str(kept_store)], 100)
    assert code == 0 and "┃" in said and "rounds: 2" not in said
    print_table("t", ["a", "b", "c"], [[1, 2, 3]])
    assert "┃" in capsys.readouterr().out


def shell(line, store, expected_code):
    """What a command writes to stderr when a shell runs `sera …` this way."""
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; sera() {{ {" ".join(SERA)} "$@"; }}; {line}'],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SERA_STORE": str(store)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == expected_code, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["show first", "list --json", "gc"])
def test_a_reader_that_is_not_there_or_goes_away_is_exit_code_1_and_no_word(kept_store, command):
    assert shell(f"sera {command} >&-", kept_store, 1) == ""
    assert shell(f"sera {command} | true", kept_store, 1) == ""


def test_with_stderr_closed_the_answer_stays_on_stdout(kept_store):
    assert shell("[ \"$(sera show nobody 2>&-)\" = '' ]", kept_store, 0) == ""
    assert shell('sera list --json 2>&- | grep -q \'"run": "first"\'', kept_store, 0) == ""


def test_a_disk_that_is_full_is_no_success(kept_store):
    assert "No space left" in shell("sera list > /dev/full", kept_store, 1)


@pytest.mark.parametrize("seconds", [0.2, 0.6])
def test_an_interrupt_during_the_imports_is_exit_code_130_and_no_trace(kept_store, seconds):
    process = subprocess.Popen(
        [*SERA, "gc", "--store", str(kept_store)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0), err  # 0: it was faster
    assert "Traceback" not in err and (process.returncode == 0 or out == "")
