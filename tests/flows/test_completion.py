"""`sera completion`: what bash completes with the script, really asked."""

import os
import pty
import select
import shlex
import subprocess
import time

import pytest

from flows.cli import ADDERS


@pytest.fixture
def script(sera, tmp_path):
    """The script for bash, in a file."""
    path = tmp_path / "sera.bash"
    path.write_text(sera("completion", "bash").out)
    return path


@pytest.fixture
def completed(script, tmp_path):
    """What bash offers for a line whose last word is being typed."""

    def ask(*words, **environment):
        line = " ".join(shlex.quote(word) for word in words)
        code = f"""
            source {script}
            COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
            _shtab_sera 2>/dev/null
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(
            ["bash", "--norc", "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **environment},
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return ask


def test_bash_completes_commands_flags_and_choices(completed):
    assert completed("sera", "ru") == ["run"]
    names = {add.__name__.removeprefix("add_") for add in ADDERS}
    assert names <= set(completed("sera", ""))
    assert completed("sera", "run", "--na") == ["--name"]
    assert completed("sera", "watch", "x", "--on") == ["--once"]
    assert set(completed("sera", "review", "r", "--decision", "")) == {"promote", "hold", "roll_back", "stop"}


def test_bash_completes_experiments_and_the_runs_of_a_local_store(completed, tmp_path, kept_store):
    (tmp_path / "mine.toml").touch()
    (tmp_path / "mine.jsonl").touch()
    assert completed("sera", "plan", "mi") == ["mine.toml"]
    assert completed("sera", "show", "", SERA_STORE=str(kept_store)) == ["first", "second"]
    assert completed("sera", "show", "", SERA_STORE="s3://bucket/runs") == []


def test_a_folder_among_the_runs_whose_name_is_a_command_is_not_run(completed, tmp_path):
    store = tmp_path / "sera-store" / "runs"
    for name in ("mine", "$(touch done)", "`touch done`"):
        (store / name).mkdir(parents=True)
    assert completed("sera", "watch", "") == ["mine"]
    assert not (tmp_path / "done").exists()


def test_a_tab_in_a_terminal_completes_the_line(script, tmp_path):
    """An interactive bash: `ru` and a tab, `--na` and a tab."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "> "},
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, f"source {script}; set +o history\n".encode())
    os.write(ours, b"sera ru\t--na\t")
    said, until = b"", time.monotonic() + 30
    while b"sera run --name" not in said and time.monotonic() < until:
        if select.select([ours], [], [], 1)[0]:
            said += os.read(ours, 4096)
    process.kill()
    process.wait()
    os.close(ours)
    assert b"sera run --name" in said


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_a_script_of_the_same_commands(sera, shell):
    said = sera("completion", shell, "--json").json
    assert said["shell"] == shell
    for word in ("watch", "price-per-hour", "roll_back"):
        assert word in said["script"]
    assert "run all rounds of an experiment; rerunning resumes" in said["script"]


def test_an_unknown_shell_is_bad_input(sera):
    with pytest.raises(SystemExit) as ended:
        sera("completion", "csh")
    assert ended.value.code == 2
