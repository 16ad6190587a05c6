"""What commands write to: terminals narrow and wide, readers that go away, streams that are closed."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tinyrun
from rich.cells import cell_len

from flows.commands.folding import fold
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


WORDS = re.compile(r"[\w,.+−-]+")
COLORS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def at_width(sera, monkeypatch):
    """Lines that a command writes at so many columns."""

    def run(columns, *words):
        monkeypatch.setenv("COLUMNS", str(columns))
        return sera(*words).out.splitlines()

    return run


def numbers(lines):
    """How often each number, or word with a digit, is in a text."""
    return Counter(word for line in lines for word in WORDS.findall(line) if re.search(r"\d", word))


@pytest.mark.parametrize(
    "words", [["list"], ["show", "first"], ["show", "first", "--round", "1"]], ids=" ".join
)
@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_is_longer_than_the_terminal_and_every_number_is_there(
    kept_store, at_width, monkeypatch, words, columns
):
    monkeypatch.chdir(kept_store.parent)
    wide = at_width(400, *words, "--store", "store")
    narrow = at_width(columns, *words, "--store", "store")
    assert max(map(cell_len, narrow)) <= columns
    assert not numbers(wide) - numbers(narrow)
    cells = [cell.strip() for line in narrow if "│" in line for cell in line.strip("│").split("│")]
    assert "" not in cells  # no cell is folded


def test_a_plan_fits_too_and_leaves_out_only_what_each_step_waits_for(tmp_path, at_width):
    words = ["plan", tinyrun.experiment(tmp_path), "--store", tmp_path / "store"]
    wide, narrow = at_width(400, *words), at_width(80, *words)
    assert max(map(cell_len, narrow)) <= 80
    missing = numbers(wide) - numbers(narrow)
    assert all(re.search(r"(policy|ref|reference|promoted)-\d+", word) for word in missing)
    assert any(line.startswith("depends: on steps that are not done yet") for line in narrow)
    assert sum("│ logps" in line for line in narrow) == sum("│ logps" in line for line in wide)


@pytest.mark.parametrize("columns", [80, 160])
def test_both_sides_of_a_difference_stay_side_by_side(kept_store, at_width, columns):
    lines = at_width(columns, "diff", "first:1", "second:1", "--store", kept_store)
    assert max(map(cell_len, lines)) <= columns
    heads = [line for line in lines if line.startswith("┃")]
    assert len(heads) == 3 and all("first:1" in head and "second:1" in head for head in heads)
    (kept,) = [line for line in lines if "human/kept" in line]
    change = ["−2"] if columns == 160 else []
    assert [cell.strip() for cell in kept.strip("│").split("│")] == ["human/kept", "9", "7", *change]


def test_where_two_sides_do_not_fit_they_are_below_each_other(kept_store, at_width):
    lines = at_width(60, "diff", "first:1", "second:1", "--store", kept_store)
    at = lines.index("  metric: human/kept")
    assert lines[at + 1 : at + 3] == ["  first:1: 9", "  second:1: 7"]


def test_a_terminal_of_80_columns_is_one(kept_store):
    code, said = on_terminal(["show", "first", "--store", "store"], 80, kept_store.parent)
    assert code == 0 and max(cell_len(line) for line in COLORS.sub("", said).splitlines()) <= 80
    code, said = on_terminal(["watch", "first", "--store", "store"], 80, kept_store.parent)
    assert code == 0 and "The run stopped with `max_rounds`" in said


def test_a_row_whose_name_is_long_becomes_a_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    print_table("runs", ["run", "rounds", "head"], [["a" * 52, 12, 7]])
    said = capsys.readouterr().out
    assert f"  run: {'a' * 52}" in said and "rounds: 12" in said and "head: 7" in said


def test_a_folded_command_is_still_one_for_a_shell(tmp_path):
    line = f"  sera show first --round 1 --store {'s' * 40}      # pairs, reasons, artifacts"
    lines = list(fold(line, 60))
    assert max(map(len, lines)) <= 60 and lines[0] == "  # pairs, reasons, artifacts"
    script = "sera() { printf '%s|' \"$@\"; }\n" + "\n".join(lines)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == f"show|first|--round|1|--store|{'s' * 40}|"


@pytest.mark.parametrize("server", ["vllm serve", "llama-server -m"])
def test_a_folded_serving_command_is_still_one_for_a_shell(server):
    lines = list(fold(f"  {server} policy --served-model-name demo-0 --max-model-len 512", 60))
    assert len(lines) == 2 and lines[0].endswith(" \\")


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
