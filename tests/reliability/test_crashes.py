"""The crash matrix: all points in a folder and on moto, every fifth on Ceph; `make faults`: all on all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import objectstores
import pytest
from reliability.crashing import Crash

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
LEAST_POINTS = 150


def matrix(wanted: str) -> list[Crash]:
    """The program's cases: in a process of its own, for each case is a fork of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "reliability.crashing", wanted],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [Crash(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("store", "every"),
    [
        pytest.param("local", 1, marks=pytest.mark.slow),
        pytest.param("moto", 1, marks=pytest.mark.s3),
        pytest.param("radosgw", 5, marks=pytest.mark.s3),
    ],
)
def test_a_run_killed_at_any_commit_point_resumes_to_the_same_policy(store, every):
    if store == "radosgw":
        objectstores.require_radosgw()
    crashes = matrix(f"{store}:{every}")
    assert [crash for crash in crashes if not crash.is_good] == []
    assert len(crashes) >= LEAST_POINTS // every
    assert any(crash.steps_repeated for crash in crashes)
