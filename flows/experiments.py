"""Experiment files: TOML with the sections of SeraConfig, and overrides `--set a.b=value`."""

import difflib
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sera_core.artifacts.run_records import flatten
from sera_core.config import CHOSEN, NO_SFT, SeraConfig
from sera_core.data.file_checks import refuse_special
from sera_core.data.sources import bundled_file
from sera_core.effects import ineffective_settings
from sera_core.errors import InputError
from sera_core.guards.urls import secret_in, without_secrets
from sera_core.judges.names import FILE, LOCAL, REWARD

SIDES = ("train", "heldout", "test", "prompts")


def load_experiment(path: str, sets: Sequence[str] = ()) -> SeraConfig:
    """Read an experiment (a file, or `bundled:<name>`), apply `a.b=value` overrides, check every field.

    Paths in the file are relative to its folder; paths in --set to the working directory.

    Raises:
        InputError: no such file, not TOML, an unknown key (the nearest is suggested), a value out of range.
    """
    return with_changes(load_settings(path), sets, str(experiment_file(path)))


def with_changes(data: dict[str, Any], sets: Sequence[str], where: str) -> SeraConfig:
    """Checked settings with overrides (`a.b=value`); `where` says where they come from.

    Raises:
        InputError: an unknown key (the nearest is suggested), a value out of range.
    """
    changes: dict[str, Any] = {}
    for change in sets:
        _set(changes, change)
    _anchor(changes, Path.cwd())
    where = f"{where} with --set" if sets else where
    whole = merged(data, changes)
    if sets and _is_valid(data):
        whole = without_idle(whole, changes)
    return parse_config(whole, where)


def without_idle(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that have no effect because of the overrides.

    `--set mix.shares=[0.0]` makes the file's sampling settings idle, so they are dropped. An override without
    effect, or a setting that has none even without the overrides, is still refused.
    """
    try:
        config = SeraConfig.stored(settings)
    except ValidationError:
        return settings  # reported when the settings are checked
    named, result = flatten(changes), settings
    for field, *_ in ineffective_settings(config):
        section, _, name = field.partition(".")
        if field not in named and name in result.get(section, {}):
            result = {**result, section: {k: v for k, v in result[section].items() if k != name}}
    return result


def _is_valid(settings: dict[str, Any]) -> bool:
    try:
        SeraConfig.model_validate(settings)
    except ValidationError:
        return False
    return True


def load_settings(path: str) -> dict[str, Any]:
    """Read an experiment file's settings, unchecked, with relative paths made absolute.

    Raises:
        InputError: no such file, or not TOML.
    """
    file = experiment_file(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid TOML: {error}") from error
    _anchor(data, file.parent)
    return data


def experiment_file(path: str) -> Path:
    """Path of the experiment file; `bundled:<name>` is one shipped with the package."""
    file = bundled_file("experiments", path[8:] + ".toml") if path.startswith("bundled:") else Path(path)
    if not refuse_special(file).is_file():
        raise InputError(f"experiment {path}: no such file; give the path of a TOML file, or bundled:demo")
    return file


def parse_config(data: dict[str, Any], where: str) -> SeraConfig:
    """Validate a nested dictionary; the error lists all problems by field."""
    try:
        return SeraConfig.model_validate(data)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        single = [line for found in lines for line in found.splitlines()]
        raise InputError("\n".join(f"{where}: {line}" for line in single)) from None


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown key{_nearest(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{field}: missing; every experiment needs it"
    value = problem.get("input")
    show_value = isinstance(value, str | int | float | bool) and not secret_in(str(value))
    shown = f" (found {value!r})" if show_value else ""
    return f"{field}: {problem['msg'].removeprefix('Value error, ')}{shown}".removeprefix(": ")


def _nearest(loc: tuple[Any, ...]) -> str:
    names = _keys(SeraConfig, loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), close[0]])}?"
    return f"; known keys: {', '.join(names)}"


def _keys(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        inner = [
            a
            for a in (annotation, *typing.get_args(annotation))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _set(data: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise InputError(
            f"--set {without_secrets(change)!r}: write section.key=value, for example --set train.beta=0.2"
        )
    parts = key.strip().split(".")
    for part in parts[:-1]:
        data = data.setdefault(part, {})
    data[parts[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """Parse as TOML, else as JSON (null), else keep the text."""
    for parse in (lambda t: tomllib.loads(f"x = {t}")["x"], json.loads):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def merged(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the changes applied, section by section."""
    result = dict(data)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _is_path(sft: str) -> bool:
    """Whether `start.sft` names a local file."""
    return ":" not in sft and sft not in (NO_SFT, CHOSEN)


def _anchor(data: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, and turn a plain path (`train = "pairs.jsonl"`) into a source."""
    section = data.get("data")
    for side in SIDES:
        if isinstance(section, dict) and side in section:
            given = section[side]
            sources = given if isinstance(given, list) else [given]
            section[side] = [_source(source, folder) for source in sources]
    start = data.get("start")
    if isinstance(start, dict) and isinstance(sft := start.get("sft"), str) and _is_path(sft):
        data["start"] = {**start, "sft": str((folder / sft).absolute())}
    pairing = data.get("pairing")
    if isinstance(pairing, dict) and isinstance(pairing.get("by"), str):
        kind, _, path = pairing["by"].partition(":")
        if kind in (REWARD, LOCAL, FILE) and path and (folder / path).exists():
            pairing["by"] = f"{kind}:{(folder / path).resolve()}"
    model = data.get("model")
    if isinstance(model, str):
        data["model"] = model = {"source": model}
    if isinstance(model, dict) and isinstance(model.get("source"), str):
        source = model["source"]
        if ":" not in source and (folder / source).is_dir():
            model["source"] = str((folder / source).resolve())
    if isinstance(model, dict):
        template = model.get("chat_template")
        if isinstance(template, str) and _is_template_file(folder / template):
            model["chat_template"] = (folder / template).read_text()


def _is_template_file(path: Path) -> bool:
    try:
        return refuse_special(path).is_file()
    except OSError:  # Jinja text may be too long for a file name
        return False


def _source(source: Any, folder: Path) -> Any:
    source = {"path": source} if isinstance(source, str) else source
    if isinstance(source, dict) and isinstance(source.get("path"), str) and ":" not in source["path"]:
        return {**source, "path": str((folder / source["path"]).absolute())}
    return source
