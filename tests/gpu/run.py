"""A small run from the command line, killed while it trains and resumed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tinyrun
from commandline import SERA

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""Time that the first round may take."""


def killed_and_resumed(device: str) -> dict[str, Any]:
    """Seconds until the kill and of the resumed run, and how the run ended.

    Raises:
        RuntimeError: the run could not be killed in round 1, lost something, or did not end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        execution = {"device": device, "child": "always"}
        experiment = tinyrun.experiment(folder, limits={"rounds": 2}, execution=execution)
        command = [*SERA, "run", str(experiment), "--store", str(folder / "store"), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=folder) as run:
            first = folder / "store" / "runs" / "tiny" / "round-000.json"
            while not first.exists():
                if run.poll() is not None or time.perf_counter() > start + SECONDS:
                    run.kill()
                    raise RuntimeError(
                        "the run ended, or took too long, before its first round was committed"
                    )
                time.sleep(0.05)
            run.send_signal(signal.SIGKILL)
        killed, before = time.perf_counter(), first.read_bytes()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        sys.stderr.write(done.stderr[-2000:])
        if done.returncode != 0 or first.read_bytes() != before:
            raise RuntimeError(f"the killed run did not resume: exit code {done.returncode}")
        found = json.loads(done.stdout)
        return {
            "until_killed_seconds": round(killed - start, 1),
            "resumed_seconds": round(time.perf_counter() - killed, 1),
            "rounds": len(found["rounds"]),
            "stop_reason": found["stop_reason"],
        }
