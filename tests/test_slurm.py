"""deployments/slurm/job.sbatch in bash, with a stand-in for scontrol; it was never run under Slurm."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

JOB = Path(__file__).parents[1] / "deployments" / "slurm" / "job.sbatch"


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """The job's script as Slurm starts it, with a `scontrol` that notes its arguments."""
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\n')
    (folder / "scontrol").chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", **environment}
    return subprocess.Popen(
        ["bash", str(JOB), *command], env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, file.name
        time.sleep(0.02)


def test_bash_reads_the_script_and_it_says_that_slurm_never_did():
    assert subprocess.run(["bash", "-n", str(JOB)]).returncode == 0
    first, second, *_ = JOB.read_text().splitlines()
    assert first == "#!/bin/bash" and second.startswith("# Not run under Slurm")


def test_sbatch_s_lines_come_before_every_command_and_ask_to_be_queued_again():
    lines = JOB.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    before = [line for line in lines[: lines.index(f"#SBATCH {options[-1]}")] if not line.startswith("#")]
    assert not before  # sbatch ignores what comes after a command
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@180"} <= set(options)


def test_before_its_time_ends_the_job_is_queued_again_and_the_command_goes_on(tmp_path):
    script = f"touch {tmp_path}/started; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; exit 7"
    job = start(tmp_path, "sh", "-c", script, SERA_STORE="/shared")
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "scontrol.log")
    assert job.poll() is None  # it is Slurm that ends it
    (tmp_path / "go").touch()
    job.communicate(timeout=30)
    assert job.returncode == 7
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"


def test_the_job_ends_with_its_command_s_exit_code_and_passes_arguments_as_they_are(tmp_path):
    job = start(tmp_path, "sh", "-c", 'printf "%s|" "$@"; exit 3', "sera", "a b", "*", SERA_STORE="/shared")
    out, _ = job.communicate(timeout=30)
    assert (out, job.returncode) == ("a b|*|", 3)
    assert not (tmp_path / "scontrol.log").exists()


def test_without_a_command_or_a_store_nothing_starts(tmp_path):
    job = start(tmp_path, SERA_STORE="/shared")
    _, told = job.communicate(timeout=30)
    assert job.returncode == 2 and "sbatch job.sbatch sera run" in told
    job = start(tmp_path, "touch", str(tmp_path / "started"))
    _, told = job.communicate(timeout=30)
    assert job.returncode == 2 and "SERA_STORE" in told and "s3://" in told
    assert not (tmp_path / "started").exists()
