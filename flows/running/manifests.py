"""Build the manifest of a finished round."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.round import Steps
from flows.running.session import Session, tokens_of
from sera_core.artifacts.canonical import files_digest
from sera_core.artifacts.manifest import StepRecord
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.run_records import ACCURACY, BEST, HEAD, RoundManifest, now
from sera_core.errors import StoreError

FILES = {
    "policy": ("policy", "policy/"),
    "pairs": ("pairs", "train.parquet"),
    "scored": ("scored", "scored.parquet"),
    "ledger": ("mixture", "ledger.parquet"),
    "responses": ("responses", "responses.parquet"),
    "mixture": ("mixture", "mixture.parquet"),
    "report": ("report", "report.html"),
}
"""The artifacts listed in a manifest: role -> (role of the step, file or folder in it)."""
DECIDED = (
    BEST,
    HEAD,
    "best_reason",
    "score",
    "score_metric",
    "since_round_0",
    "verdict_reason",
    "alarm_reason",
)
"""Metrics that a manifest takes from its decision."""


def manifest_of(session: Session, round: int, made: Steps) -> RoundManifest:
    """The manifest of a finished round; a round without pairs has no policy, evidence or decision."""
    records = {role: session.record_of(ref) for role, ref in made.items() if ref is not None}
    earlier = {ref.key for manifest in session.history.rounds for ref in manifest.used}
    return RoundManifest(
        format=FORMAT,
        run=session.run,
        round=round,
        config_sha256=session.record.config_sha256,
        parent_sha256=None,
        steps={role: record.ref for role, record in records.items()},
        used=[record.ref for record in session.used.values()],
        artifacts=artifacts_of(records),
        created=now(),
        **manifest_fields(records, [record for key, record in session.used.items() if key not in earlier]),
    )


def manifest_fields(records: Mapping[str, StepRecord], new: Sequence[StepRecord]) -> dict[str, Any]:
    """The manifest fields derived from step records.

    Args:
        records: records of the round's own steps, by role.
        new: records of all steps first used in this round; they give its tokens and seconds.

    Raises:
        StoreError: a record lacks a metric.
    """
    mixture = records["mixture"]
    evidence = records.get("evidence")
    return {
        "pairs": {"human": mixture.metric("pairs/human"), "generated": mixture.metric("pairs/generated")},
        "target_share": mixture.metric("target_share"),
        "generated_share": mixture.metric("generated_share") or 0.0,
        "metrics": _metrics(records, new),
        "accuracy": None if evidence is None else evidence.metric(ACCURACY)["value"],
        **_decision(records),
    }


def artifacts_of(records: dict[str, StepRecord]) -> dict[str, dict[str, Any]]:
    """The round's artifacts: step, path, sha256 (for a folder: its digest), bytes and rows.

    Raises:
        StoreError: a step's record names no such file.
    """
    return {
        role: artifact(_naming(records[step], path), path)
        for role, (step, path) in FILES.items()
        if step in records
    }


def _naming(record: StepRecord, path: str) -> StepRecord:
    if not any(name.startswith(path) for name in record.files):
        raise StoreError(
            f"steps/{record.step}/{record.key}/done.json: names no file {path!r}; restore it from a copy of "
            "the store"
        )
    return record


def artifact(record: StepRecord, path: str) -> dict[str, Any]:
    """One artifact of a step: a file, or a folder (its path ends with a slash)."""
    place = {"step": record.step, "key": record.key, "path": path}
    if not path.endswith("/"):
        file = record.files[path]
        return {**place, "sha256": file.sha256, "bytes": file.bytes, "rows": file.rows}
    files = {name.removeprefix(path): file for name, file in record.files.items() if name.startswith(path)}
    digest = files_digest({name: file.sha256 for name, file in files.items()})
    return {**place, "sha256": digest, "bytes": sum(file.bytes for file in files.values()), "rows": None}


def _decision(records: Mapping[str, StepRecord]) -> dict[str, Any]:
    if records["mixture"].metric("reason") == "no_pairs":
        reason = "no pairs are left to train on: see the ledger for why each was dropped"
        return {"decision": "stop", "reason": reason, "stop_reason": "no_pairs"}
    return {name: records["decision"].metric(name) for name in ("decision", "reason", "stop_reason")}


def _metrics(records: Mapping[str, StepRecord], new: Sequence[StepRecord]) -> dict[str, Any]:
    """Metrics to compare between rounds; the full evidence is an artifact of its own."""
    metrics: dict[str, Any] = {}
    for role in ("evidence", "policy", "mixture", "capabilities"):
        metrics |= records[role].metrics if role in records else {}
    metrics |= records["mixture"].counts  # <origin>/<reason> of every pair and prompt
    for role in ("scored", "responses"):
        if role in records:
            names = ("margin_noise", "review/")
            metrics |= {n: v for n, v in records[role].metrics.items() if n.startswith(names)}
    if "responses" in records:
        metrics |= {
            name: v for name, v in records["responses"].metrics.items() if name.startswith("responses")
        }
        metrics |= {n: c for n, c in records["responses"].counts.items() if n.startswith("prompts")}
    if "decision" in records:
        decided = records["decision"]
        metrics |= {name: decided.metric(name) for name in ("verdict", "alarm", "overlap", "ks")}
        metrics |= {name: decided.metrics[name] for name in DECIDED if name in decided.metrics}
    metrics |= _token_counts(new)
    metrics["tokens"] = sum(tokens_of(record) for record in new)
    metrics["seconds"] = round(sum(record.seconds for record in new), 3)
    return metrics


def _token_counts(records: Sequence[StepRecord]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        for name, value in record.metrics.items():
            if name.startswith("tokens/"):
                counts[name] = counts.get(name, 0) + int(value)
    return counts
