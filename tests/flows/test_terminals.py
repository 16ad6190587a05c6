"""What commands write to: terminals narrow and wide, readers that go away, streams that are closed."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows.commands.printing import print_table

REPOSITORY = Path(__file__).parents[2]
SERA = [sys.executable, "-P", "-m", "flows.cli"]
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
