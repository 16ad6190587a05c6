"""What differs between two rounds, of one run or two: configuration, steps, metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sera_core.artifacts.manifest import StepRef
from sera_core.artifacts.run_records import RoundManifest, changes, flatten
from sera_core.artifacts.runs import RunStore


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run and one of its rounds (None if it has no finished round)."""

    records: RunStore
    manifest: RoundManifest | None

    @property
    def name(self) -> dict[str, Any]:
        """Run and round."""
        return {"run": self.records.run, "round": self.manifest.round if self.manifest else None}


def difference(left: Side, right: Side) -> dict[str, Any]:
    """The differences, as in `sera diff --json`; equal values are left out."""
    steps = _steps(left.manifest, right.manifest)
    return {
        "left": left.name,
        "right": right.name,
        "same_artifacts": not steps,
        "config": _config(left.records, right.records),
        "steps": steps,
        "metrics": _metrics(left.manifest, right.manifest),
    }


def _config(left: RunStore, right: RunStore) -> list[dict[str, Any]]:
    """Differing settings and content digests."""
    records = [records.configs()[-1] for records in (left, right)]
    both = [_by_number({**record.config, "digests": record.resolved["digests"]}) for record in records]
    decide = {key for record in records for key in flatten(_by_number(record.resolved))}
    return [
        {"key": key, "left": was, "right": now, "changes_result": key in decide}
        for key, was, now in changes(*both)
    ]


def _by_number(value: Any) -> Any:
    """Turn lists of sections (data sources) into sections keyed by number, so that each setting has a key."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    return {k: _by_number(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _steps(left: RoundManifest | None, right: RoundManifest | None) -> list[dict[str, Any]]:
    a, b = (dict(manifest.steps) if manifest else {} for manifest in (left, right))
    return [
        {"role": role, "left": _dump(a.get(role)), "right": _dump(b.get(role)), "why": _why(a, b, role)}
        for role in sorted(a.keys() | b.keys())
        if a.get(role) != b.get(role)
    ]


def _dump(ref: StepRef | None) -> dict[str, Any] | None:
    return None if ref is None else ref.model_dump()


def _why(left: Mapping[str, StepRef], right: Mapping[str, StepRef], role: str) -> str:
    if role not in left or role not in right:
        return "only right" if role not in left else "only left"
    if left[role].key == right[role].key:
        return "same step, other content"
    if left[role].digest == right[role].digest:
        return "other settings or inputs, same content"
    return "other settings or inputs"


def _metrics(left: RoundManifest | None, right: RoundManifest | None) -> list[dict[str, Any]]:
    a, b = (manifest.metrics if manifest else {} for manifest in (left, right))
    return [
        {"metric": name, "left": a.get(name), "right": b.get(name)}
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
