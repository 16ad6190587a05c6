"""docker/compose.yaml as data: read, its variables named, filled in as docker compose does."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docker" / "compose.yaml"
EXAMPLE = ROOT / "docker" / "env.example"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\}")


def read() -> dict[str, Any]:
    """The file, its anchors merged and its variables as they stand."""
    return yaml.safe_load(PATH.read_text())


def variables(value: Any) -> dict[str, str]:
    """Variables in it, and how each is taken: `:?` refused when empty, `:-` with a default, `` as it is."""
    found: dict[str, str] = {}
    if isinstance(value, str):
        found |= {match["name"]: match["kind"] or "" for match in _VARIABLE.finditer(value)}
    elif isinstance(value, dict):
        for name, part in value.items():
            found |= variables(part)
            if name == "environment":  # a name without a value is handed on from outside
                found |= {passed: "" for passed, given in part.items() if given is None}
    elif isinstance(value, list):
        for part in value:
            found |= variables(part)
    return found


def filled(value: Any, given: dict[str, str]) -> Any:
    """The same with the variables filled in.

    Raises:
        KeyError: a variable that may not be empty is not given.
    """
    if isinstance(value, dict):
        return {name: filled(part, given) for name, part in value.items()}
    if isinstance(value, list):
        return [filled(part, given) for part in value]
    return _VARIABLE.sub(lambda match: _one(match, given), value) if isinstance(value, str) else value


def _one(match: re.Match[str], given: dict[str, str]) -> str:
    name, kind, rest = match.group("name", "kind", "rest")
    if given.get(name):
        return given[name]
    if kind == ":?":
        raise KeyError(f"{name}: {rest}")
    return rest if kind == ":-" else ""


def example() -> dict[str, str]:
    """The variables of env.example, those in comments too."""
    lines = [line.removeprefix("#") for line in EXAMPLE.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z0-9_]+=", line))
