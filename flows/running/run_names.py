"""Names of deployed runs (`{date}` and `{data}` filled in once), and lookup of finished runs."""

import string
from typing import Any

from prefect import get_client
from prefect.runtime import flow_run

from flows.running import open_run
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.records import FORMAT, read_typed
from sera_core.artifacts.run_records import Finished, check_name, now
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import Store, create_json
from sera_core.config import SeraConfig
from sera_core.errors import InputError

LABEL = "sera.run"
_PARTS = ("date", "data")


def resolve_run_name(template: str, config: SeraConfig) -> str:
    """Fill in the run's name once: a flow run that restarts on another day keeps its name.

    `{date}` is today in UTC, `{data}` eight hex digits of the sha256 of the data sources' content.

    Raises:
        InputError: an unknown placeholder, or an invalid name.
    """
    if not (used := _placeholders(template)):
        return check_name(template)
    name = _labels().get(LABEL)
    if name is None:
        values = {"date": now()[:10]}
        if "data" in used:
            values["data"] = sha256_json(open_run.source_digests(config)["data"])[:8]
        name = check_name(template.format(**{part: values[part] for part in used}))
    _label(str(name))
    return str(name)


def _placeholders(template: str) -> set[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"run name {template!r}: {error}") from error
    used = {name for _, name, _, _ in parts if name is not None}
    if unknown := used - set(_PARTS):
        raise InputError(
            f"run name {template!r}: unknown {sorted(unknown)}; allowed are {{date}} and {{data}}"
        )
    return used


def _labels() -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id).labels if flow_run.id else {}


def _label(name: str) -> None:
    if flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(flow_run.id, {LABEL: name})
            client.update_flow_run(flow_run.id, name=name)


def record_finished(records: RunStore) -> None:
    """Record that a run with this configuration and these limits is finished; only the first counts."""
    path = _finished_path(records.configs()[-1].resolved, _limits(records))
    create_json(records.store, path, {"format": FORMAT, "run": records.run, "created": now()})


def find_finished(store: Store, config: SeraConfig) -> str | None:
    """The finished run with the same settings, model and data content; None if there is none."""
    config = open_run.with_engine(config)
    resolved = open_run.resolved(config, open_run.source_digests(config))
    found = read_typed(store, _finished_path(resolved, config.limits.model_dump(mode="json")), Finished)
    return None if found is None else found.run


def _limits(records: RunStore) -> dict[str, Any]:
    return records.configs()[-1].settings.limits.model_dump(mode="json")


def _finished_path(resolved: dict[str, Any], limits: dict[str, Any]) -> str:
    return f"finished/{sha256_json({'resolved': resolved, 'limits': limits})}.json"
