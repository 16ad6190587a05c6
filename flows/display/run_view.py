"""Read a run: the JSON of `sera show`, and whether its reviewed rounds helped."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from flows.display.fine_tuning import fine_tuning
from flows.display.token_use import token_use
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import Artifact, find_record
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import Store
from sera_core.errors import InputError, StoreError
from sera_core.method.diagnostics import correctness
from sera_core.method.sides import QUANTITY_WORDS, unit
from sera_core.method.win_rates import Rate, bootstrap_difference
from sera_core.reviewers import prompt_groups


def run_records(store: Store, run: str) -> RunStore:
    """The records of an existing run.

    Raises:
        InputError: no such run.
    """
    records = RunStore(store, run)
    if not records.configs():
        raise InputError(
            f"run {run!r}: not in the store {store.url}; `sera list --store {store.url}` names the runs there"
        )
    return records


def show(records: RunStore, with_token_use: bool = True) -> dict[str, Any]:
    """The run, as in `sera show --json`.

    Args:
        records: the run.
        with_token_use: whether each round's metrics say what its forward passes were spent on (`token_use`),
            which reads the records of its steps.
    """
    history = records.history()
    rounds, earlier = [], set[str]()
    for manifest in history.rounds:
        shown = _round(records, manifest)
        if with_token_use:
            shown["metrics"] = shown["metrics"] | token_use(records.store, manifest, earlier)
        earlier |= {ref.key for ref in manifest.used}
        rounds.append(shown)
    return {
        "run": records.run,
        "config_sha256": records.configs()[-1].config_sha256,
        "stop_reason": records.stop_reason(),
        "waiting": records.waiting(),
        "head": history.head.round if history.head else None,
        "best_round": history.best.round if history.best else None,
        **({} if (tuned := fine_tuning(records)) is None else {"fine_tuning": tuned.facts}),
        "rounds": rounds,
    }


def _round(records: RunStore, manifest: RoundManifest) -> dict[str, Any]:
    names = ("round", "decision", "reason", "pairs", "target_share", "generated_share", "metrics")
    artifacts = {
        role: {
            "uri": uri_of(records.store, place),
            **{name: place[name] for name in ("sha256", "bytes", "rows")},
        }
        for role, place in manifest.artifacts.items()
    }
    return {**{name: getattr(manifest, name) for name in names}, "artifacts": artifacts}


PLANNED_COLUMNS = (
    "round", "numbers", "share", "human pairs selected", "prompts sampled", "generated pairs selected",
    "human trained on", "generated trained on",
)  # fmt: skip
"""Columns of a plan's table of rounds."""


def gibibytes(memory: int | None) -> str:
    """The memory of a step."""
    return "–" if memory is None else f"{memory / 2**30:.1f} GiB"


def planned_step(row: dict[str, Any]) -> str:
    """A step of a plan (`steps` of flows.planning.plan.plan), with what tells it from others of its kind."""
    return row["step"] if row["subject"] is None else f"{row['step']}: {row['subject']}"


def planned_cells(row: dict[str, Any]) -> list[Any]:
    """One round of a plan (`rounds` of flows.planning.plan.plan) as cells of that table."""
    names = ("human_kept", "prompts", "generated_kept", "human", "generated")
    numbers = "recorded" if row["recorded"] else "expected"
    return [row["round"], numbers, f"{row['share']:.2f}", *(row[name] for name in names)]


def uri_of(store: Store, place: dict[str, Any]) -> str:
    """URI of a manifest's artifact, a file or a folder."""
    record = find_record(store, place["step"], place["key"])
    if record is None:
        return f"{store.url}/steps/{place['step']}/{place['key']}"
    path = place["path"]
    name = next((name for name in record.files if name.startswith(path)), None)
    if name is None:
        raise StoreError(
            f"{store.url}/steps/{record.step}/{record.key}/done.json: names no file {path!r:.120}; "
            "restore it from a copy of the store"
        )
    return f"{store.url}/steps/{place['step']}/{place['key']}/{record.files[name].attempt}/{path}".rstrip("/")


class Since(NamedTuple):
    """A round against round 0."""

    measure: str
    """What rounds are compared by."""
    change: Rate
    """Its paired change."""
    unit: str
    """What it is a mean over: pairs or answers."""


def since_round_0(records: RunStore, manifest: RoundManifest) -> Since | None:
    """The paired change from round 0 to this round; None for round 0.

    Older runs recorded no such change: it is the change of held-out accuracy, measured here.
    """
    if manifest.round == 0 or "evidence" not in manifest.steps:
        return None
    recorded = manifest.metrics.get("since_round_0")
    if recorded is not None:
        quantity = manifest.metrics["score_metric"]
        return Since(QUANTITY_WORDS[quantity], _rate(recorded), unit(quantity))
    now, then = (_margins(records.store, r) for r in (manifest, records.rounds()[0]))
    both = np.isfinite(now) & np.isfinite(then)
    groups = _heldout_groups(records.store, manifest)[both]
    change = bootstrap_difference(correctness(now[both]), correctness(then[both]), seed=0, groups=groups)
    return Since("accuracy", change, "pairs")


def best_words(history: History) -> str:
    """Why the best round is the best: as the decision recorded it; older runs compared held-out accuracy."""
    reasons = [r.metrics["best_reason"] for r in history.rounds if r.metrics.get("best_reason")]
    return reasons[-1] if reasons else "the promoted one with the largest held-out accuracy"


def verdict_words(records: RunStore) -> str | None:
    """Whether the self-reviewed rounds helped, in one sentence; None without a head after round 0."""
    head = records.history().head
    if head is None or (found := since_round_0(records, head)) is None:
        return None
    change = found.change
    interval = f"[{change.low:+.3f}, {change.high:+.3f}]"
    numbers = f"{change.value:+.3f} {interval} on {change.n} held-out {found.unit}"
    claim = "No evidence that the reviewed rounds helped"
    if change.low > 0:
        claim = "The reviewed rounds helped"
    if change.high < 0:
        claim = "The reviewed rounds did harm"
    return f"{claim}: {found.measure} of the head against round 0 {numbers}."


def _rate(recorded: dict[str, Any]) -> Rate:
    value, low, high = (
        float("nan") if recorded[k] is None else recorded[k] for k in ("value", "low", "high")
    )
    return Rate(value, low, high, recorded["n"], recorded["groups"])


def _heldout_groups(store: Store, manifest: RoundManifest) -> np.ndarray:
    evidence, pairs = (Artifact(store, manifest.steps[role]) for role in ("evidence", "pairs"))
    ids = pq.read_table(evidence.path("heldout.parquet"), columns=["pair_id"])["pair_id"].to_pylist()
    return prompt_groups(pairs.path("heldout.parquet"), ids)


def _margins(store: Store, manifest: RoundManifest) -> np.ndarray:
    evidence = Artifact(store, manifest.steps["evidence"])
    return pq.read_table(evidence.path("heldout.parquet"), columns=["margin"])["margin"].to_numpy()
