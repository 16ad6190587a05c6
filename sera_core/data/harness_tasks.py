"""Task files of EleutherAI's lm-evaluation-harness, with their data: checked before any model is loaded.

A task is a YAML file whose data lies beside it. Its content decides the scores, so its digest enters the key
of the step; a task that runs code of its own, or loads data or a metric from a network, is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sera_core.artifacts.canonical import sha256_file, sha256_json
from sera_core.errors import InputError

LOCAL = ("json", "csv", "parquet")
"""Values of `dataset_path` that read files."""
NEEDED = ("task", "dataset_path", "output_type", "doc_to_text", "doc_to_target", "metric_list")
METRICS = ("acc", "acc_norm", "exact_match")
"""Metrics that score each item from 0 to 1. The harness loads and runs unknown ones from the hub."""
SPLITS = ("test_split", "validation_split")
"""The split that is scored: the first of these that a task has, as in the harness."""


@dataclass(frozen=True)
class HarnessTask:
    """One task, its data files found."""

    name: str
    config: dict[str, Any]
    """As the harness takes it, with absolute paths."""
    digest: str
    """Of the settings and the data."""


def read_tasks(paths: Sequence[str]) -> list[HarnessTask]:
    """Read task files.

    Raises:
        InputError: a file that is missing, malformed, runs code, or whose data is not in files beside it; or
            two tasks of one name.
    """
    found = [_read(Path(path)) for path in paths]
    names = [task.name for task in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"evaluate.harness: two tasks are called {name!r}; rename one (task: …)")
    return found


def _read(path: Path) -> HarnessTask:
    config = _parsed(path)
    for key in NEEDED:
        if not config.get(key) and config.get(key) != 0:
            raise InputError(f"{path}: {key} is missing; it must be a task file of lm-evaluation-harness")
    name = config["task"]
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"{path}: task is {name!r}; give it a name of letters, digits, - and _")
    if not any(config.get(split) for split in SPLITS):
        raise InputError(f"{path}: names no test_split, so nothing would be scored")
    _refuse_other_metrics(path, config["metric_list"])
    files = _data_files(path, config)
    kwargs = {**config["dataset_kwargs"], "data_files": files}
    content = {split: [sha256_file(Path(file)) for file in held] for split, held in files.items()}
    settings = {**config, "dataset_kwargs": {**kwargs, "data_files": content}}
    return HarnessTask(name, {**config, "dataset_kwargs": kwargs}, sha256_json(settings))


def _parsed(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"evaluate.harness: {path} is no file; give a task file of lm-eval")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise InputError(
            f"{path}: {error.problem}; a task that runs code (!function) is not allowed, only settings and "
            "templates"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds no settings; it must be a task file of lm-evaluation-harness")
    if "include" in config or "group" in config:
        raise InputError(f"{path}: `include` and `group` are not followed; give the whole task in one file")
    return config


def _refuse_other_metrics(path: Path, given: object) -> None:
    for entry in given if isinstance(given, list) else [given]:
        known = isinstance(entry, dict) and entry.get("metric") in METRICS and not entry.get("hf_evaluate")
        if not known:
            raise InputError(
                f"{path}: metric_list has {entry!r}; each entry must name a metric that scores items from "
                f"0 to 1, of {', '.join(METRICS)} (metric: acc)"
            )


def _data_files(path: Path, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Absolute paths of the data files by split."""
    kwargs = config.get("dataset_kwargs")
    given = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if config["dataset_path"] not in LOCAL or not isinstance(given, dict) or not given:
        raise InputError(
            f"{path}: its data must lie beside it: dataset_path: {', '.join(LOCAL)} with dataset_kwargs: "
            "{data_files: {test: FILE}}"
        )
    return {str(split): list(_beside(path, files)) for split, files in given.items()}


def _beside(path: Path, files: object) -> Iterator[str]:
    for name in files if isinstance(files, list) else [files]:
        file = path.parent / str(name)
        if "://" in str(name) or not file.is_file():
            raise InputError(f"{path}: the data file {str(name)!r} does not lie beside it")
        yield str(file.resolve())
