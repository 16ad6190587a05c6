"""The script that measures a GPU works: here at its small shape, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.flow]
ROOT = Path(__file__).parents[2]


def test_every_section_is_measured_at_the_small_shape(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.gpu", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found == json.loads(done.stdout.splitlines()[-1])
    assert found["machine"]["shape"] == "small"
    for section in ("pairs", "group8"):
        assert found[section]["float32"]["max_diff_nats"] < 1e-3
        assert found[section]["bfloat16"]["diff_ratio_trl"] < 1.5
    for kind in ("float32", "bfloat16", "lora"):
        assert found["training"][kind]["loss_max_diff"] < (1e-2 if kind == "bfloat16" else 1e-4)
    assert found["sampling"]["8"]["tokens_per_second"] > 0
    assert max(found["starts"]["later"]) < found["starts"]["first"]
    assert (found["run"]["rounds"], found["run"]["stop_reason"]) == (2, "max_rounds")


def test_an_unknown_section_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "par"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "no such section: par; choose from peak_gflops, pairs" in done.stderr
