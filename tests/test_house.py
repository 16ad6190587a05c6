"""The house itself: names that cannot be shadowed, documents that follow the code, nothing out of place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import flows
import sera_core
import tasks
from flows.cli import ADDERS, parser
from sera_core.reference import with_table

ROOT = Path(__file__).parents[1]
LIBRARIES = {
    "prefect", "torch", "transformers", "trl", "vllm", "datasets", "pandas", "s3fs", "accelerate", "peft",
    "evaluate", "docker", "ray", "tokenizers", "safetensors", "pydantic", "rich", "jinja2", "numpy",
    "pyarrow", "tensorboard", "openai",
}  # fmt: skip


def test_our_packages_are_ours():
    home = Path(sera_core.__file__).parent.parent
    assert Path(tasks.__file__).parent.parent == home
    assert Path(flows.__file__).parent.parent == home


def test_no_file_is_named_after_a_library_and_docker_is_no_package():
    files = [p for room in ("flows", "tasks", "sera_core") for p in (ROOT / room).rglob("*.py")]
    assert not [p for p in files if p.stem in LIBRARIES | {"utils", "helpers", "manager"}]
    assert not (ROOT / "docker" / "__init__.py").exists()


def test_the_table_of_settings_is_as_they_are():
    text = (ROOT / "deployments" / "experiments" / "README.md").read_text()
    assert with_table(text) == text, "run `make reference`"


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text()
    names = [add.__name__.removeprefix("add_") for add in ADDERS]
    assert not [name for name in names if f"sera {name}" not in text]
    assert parser().prog == "sera"


def documents() -> list[Path]:
    rooms = ("flows", "tasks", "sera_core", "deployments", "docker", "tests")
    return [*ROOT.glob("*.md"), *(path for room in rooms for path in (ROOT / room).rglob("*.md"))]


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as a page of the repository has them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.relative_to(ROOT)}: {link}"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_light_commands_import_neither_torch_nor_prefect():
    code = "import sys, flows.cli, sera_core.artifacts.reading, flows.planning.plan;"
    code += "print([m for m in ('torch', 'prefect', 'transformers', 'trl', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_stray_tasks_folder_does_not_shadow_ours(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('shadowed')")
    sera = Path(sys.executable).with_name("sera")
    done = subprocess.run([sera, "list", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_deployment_that_does_a_run_s_work_is_restarted_after_a_crash():
    """The automations name flows; one that they do not name would stay crashed."""
    deployments, automations = (
        yaml.safe_load((ROOT / "deployments" / file).read_text())[key]
        for file, key in (("prefect.yaml", "deployments"), ("automations.yaml", "automations"))
    )
    working = {entry["name"] for entry in deployments} - {"sera-gc"}  # on a schedule, and quick
    related = [entry["trigger"].get("match_related", {}) for entry in automations]
    named = [set(one["prefect.resource.name"]) for one in related if "prefect.resource.name" in one]
    assert len(named) == 4 and all(names == working for names in named)
