"""Every command of the README is one that works: each is run here, or named with the test that runs it."""

import re
import shlex
from pathlib import Path

import pytest
import tinyrun
from fixtures.make_store import SMALL

from flows.cli import parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

ALONE = ("sera demo", "sera deploy", "sera doctor")
"""Commands that need nothing more. Sentences name others without their arguments, such as `sera init`."""

RUN_ELSEWHERE = {
    "sera demo": "tests/test_wheel.py",
    "sera compare mine.toml": "tests/flows/test_comparing.py",
    "sera evaluate demo --judge J": "tests/flows/test_judging.py",
    "sera deploy": "tests/flows/test_deploying.py",
}
"""Commands that would take too long once more, by the test that runs them."""


def commands() -> list[str]:
    """All commands but those of the command table, which are forms; without their comments, in order."""
    text = re.sub(r"^\| `sera .*$", "", README, flags=re.M)
    fenced, plain = text.split("\n```")[1::2], text.split("\n```")[::2]
    lines = [line.split("#")[0] for block in fenced for line in block.splitlines()]
    lines += [code for part in plain for code in re.findall(r"`([^`\n]+)`", part)]
    named = [" ".join(line.split()) for line in lines if re.match(r"sera [a-z]", line)]
    return [name for name in dict.fromkeys(named) if " " in name.removeprefix("sera ") or name in ALONE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader has after `make demo`, but of a tiny policy, and pairs of their own."""
    folder = tmp_path_factory.mktemp("readme")
    config = tinyrun.config(folder / "sources", **{**SMALL, "limits": {"rounds": 3}})
    tinyrun.work(config, folder / "sera-store", "demo")
    tinyrun.write_rows(folder / "my_pairs.jsonl", tinyrun.pairs(32, seed=1))
    return folder


def as_here(command: str, folder: Path) -> list[str]:
    """The words of a command, with a tiny policy for the README's model."""
    words = shlex.split(
        command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder / "sources" / "policy"))
    )[1:]
    if words[:2] == ["run", "mine.toml"]:  # `sera init` wrote it for a real run
        few = ["limits.rounds=1", "sampling.max_tokens=4", "evaluate.max_tokens=4"]
        words += [word for setting in few for word in ("--set", setting)]
    return words + (["--prompt", "What is a tide?", "--max-tokens", "4"] if words[0] == "chat" else [])


@pytest.mark.flow
def test_every_command_of_the_readme_works(sera, folder, monkeypatch):
    monkeypatch.chdir(folder)
    ran = [command for command in commands() if command not in RUN_ELSEWHERE]
    for command in ran:
        sera(*as_here(command, folder))
    assert {as_here(command, folder)[0] for command in ran} >= {
        "show",
        "init",
        "plan",
        "run",
        "export",
        "data",
    }
    assert (folder / "report" / "index.html").is_file() and (folder / "policy" / "config.json").is_file()


@pytest.mark.flow
def test_the_readme_s_python_works(folder, monkeypatch):
    monkeypatch.chdir(folder)
    block = README.split("\n```python\n")[1].split("\n```")[0]
    exec(block, found := {})
    assert found["run"].name == "demo" and len(found["run"].rounds) == 3


def test_a_command_that_is_run_elsewhere_is_one():
    assert not set(RUN_ELSEWHERE) - set(commands()), "the README does not name it any more"
    for command, test in RUN_ELSEWHERE.items():
        assert f'"{command.split()[1]}"' in (ROOT / test).read_text(), test


def test_every_form_in_the_command_table_names_flags_that_exist():
    """`[--round N]` in the table of commands: a flag of that command."""
    forms = re.findall(r"`sera ([a-z]+)([^`]*)`", "\n".join(re.findall(r"^\| `sera .*$", README, re.M)))
    (commands,) = (one.choices for one in parser()._actions if isinstance(one.choices, dict))
    for name, rest in forms:
        known = {flag for action in commands[name]._actions for flag in action.option_strings}
        assert not set(re.findall(r"--[a-z-]+", rest)) - known, f"sera {name}"


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)\b(?=[`:,) ]|\s*#)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert len(README.splitlines()) <= 150
