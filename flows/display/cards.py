"""Prefect artifacts: a card per round, an index of the run, and plans."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey

from flows.display import compare_words
from flows.display.compared import Compared
from flows.display.compared_alarm import alarm_words
from flows.display.judged_arms import (
    PAIR_COLUMNS,
    STRENGTH_COLUMNS,
    judge_lines,
    pair_rows,
    strength_rows,
)
from flows.display.markdown import escape, table, verbatim
from flows.display.round_card import command, round_card, stop_words, with_interval
from flows.display.run_view import PLANNED_COLUMNS, gibibytes, planned_cells, planned_step, verdict_words
from flows.judged_arms import JudgedArms
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore


def key_of(run: str, what: str) -> str:
    """Key of an artifact. Keys are global and consist of lower-case letters, digits and dashes.

    A name with other characters gets a hash, so that `a.b` and `A-b` have different keys.
    """
    slug = re.sub(r"[^a-z0-9-]", "-", run.lower())
    apart = "" if slug == run else "-" + hashlib.sha256(run.encode()).hexdigest()[:8]
    return f"{slug}{apart}-{re.sub(r'[^a-z0-9]+', '-', what.lower()).strip('-')}"


# ----------------------------------------------------------------------------------------------- publishing


def publish_round(records: RunStore, manifest: RoundManifest, show_text: bool) -> None:
    """Publish the card of a finished round, with texts of pairs if `show_text`."""
    create_markdown_artifact(
        round_card(records, manifest, show_text),
        key=key_of(records.run, f"round-{manifest.round}"),
        description=_description(records, manifest),
    )


def publish_index(records: RunStore) -> None:
    """Publish the run's index."""
    create_markdown_artifact(
        index_card(records), key=key_of(records.run, "index"), description=_description(records)
    )


def publish_plan(run: str, found: dict[str, Any]) -> None:
    """Publish a plan (see flows.planning.plan)."""
    create_markdown_artifact(
        plan_card(run, found), key=key_of(run, "plan"), description=f"plan of run {escape(run)}"
    )


def publish_comparison(name: str, found: Compared, store_url: str, judged: JudgedArms | None = None) -> None:
    """Publish the tables of a comparison."""
    create_markdown_artifact(
        comparison_card(name, found, judged),
        key=key_of(name, "comparison"),
        description=escape(f"comparison {name}, in {store_url}"),
    )


def publish_evaluation(records: RunStore, judge: str, lines: Sequence[str]) -> None:
    """Publish what a judge said of two rounds."""
    create_markdown_artifact(
        f"# {escape(f'judge {judge} on run {records.run}')}\n\n{verbatim(lines)}\n",
        key=key_of(records.run, f"judge-{judge}"),
        description=_description(records),
    )


def publish_missing(records: RunStore) -> None:
    """Publish cards of finished rounds that are missing on this server.

    The server's database was lost, or the process died between a round's manifest and its card.
    """
    rounds = {key_of(records.run, f"round-{m.round}"): m for m in records.rounds()}
    if not rounds:
        return
    wanted = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=list(rounds)))
    there = get_client(sync_client=True).read_latest_artifacts(artifact_filter=wanted)
    seen = {(card.key, card.description) for card in there}
    missing = [m for key, m in rounds.items() if (key, _description(records, m)) not in seen]
    if not missing:
        return
    show_text = records.configs()[-1].settings.review.show_text
    for manifest in missing:
        publish_round(records, manifest, show_text)
    publish_index(records)


def _description(records: RunStore, manifest: RoundManifest | None = None) -> str:
    """Names the store, since runs of the same name in different stores share keys."""
    which = f"run {records.run}" + ("" if manifest is None else f", round {manifest.round}")
    return escape(f"{which}, in {records.store.url}")


def comparison_card(name: str, found: Compared, judged: JudgedArms | None = None) -> str:
    """The arms of a comparison: a row each, their differences, what must be known to read them, and what a
    judge says."""
    rows = [[escape(compare_words.cell(value)) for value in row] for row in compare_words.rows(found)]
    lines = [*compare_words.differences(found), *alarm_words(found.alarms), *compare_words.unequal(found)]
    parts = [
        f"# comparison {escape(name)}",
        table(list(compare_words.COLUMNS), rows),
        escape(compare_words.measured_on(found)),
        "\n".join(f"- {escape(line)}" for line in lines),
        *([] if judged is None else _judged(judged)),
        f"Runs: {escape(', '.join(compare_words.run_names(found)))}",
    ]
    return "\n\n".join(parts) + "\n"


def _judged(found: JudgedArms) -> list[str]:
    tables = ((PAIR_COLUMNS, pair_rows(found)), (STRENGTH_COLUMNS, strength_rows(found)))
    return [
        "## By a judge",
        *(
            table(list(columns), [[escape(str(cell)) for cell in row] for row in rows])
            for columns, rows in tables
        ),
        *(escape(line) for line in judge_lines(found)),
    ]


# ------------------------------------------------------------------------------------------------- the index


def index_card(records: RunStore) -> str:
    """The run so far: one line per round, with a link to its card."""
    history, stop = records.history(), records.stop_reason()
    parts = [
        f"# run {escape(records.run)}",
        f"**{_state(records, stop)}**",
        escape(verdict_words(records) or ""),
        f"head: {_round(history.head)} · best round: {_round(history.best)} · store: "
        + escape(records.store.url),
        "## Rounds",
        table(
            ["card", "decision", "human pairs", "generated pairs", "held-out accuracy"],
            [_line(records.run, manifest) for manifest in history.rounds],
        ),
        "\n".join(f"- round {m.round}, {m.decision}: {escape(m.reason)}" for m in history.rounds),
        "## Commands",
        verbatim(
            [
                command(records, "show"),
                command(records, "report", "--out report"),
                command(records, "export", "--to policy"),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _state(records: RunStore, stop: str | None) -> str:
    if stop is not None:
        return f"stopped ({escape(stop)}): {stop_words(stop)}"
    waiting = records.waiting()
    if waiting is None:
        return "open"
    return escape(f"waiting for a review of round {waiting['round']}, until {waiting['until']}")


def _round(manifest: RoundManifest | None) -> str:
    return "none" if manifest is None else str(manifest.round)


def _line(run: str, manifest: RoundManifest) -> list[str]:
    accuracy = manifest.metrics.get("heldout/rewards/accuracies")
    return [
        f"[round {manifest.round}](/artifacts/key/{key_of(run, f'round-{manifest.round}')})",
        manifest.decision,
        f"{manifest.pairs['human']:,}",
        f"{manifest.pairs['generated']:,}",
        with_interval(accuracy),
    ]


# --------------------------------------------------------------------------------------------------- a plan


def plan_card(run: str, found: dict[str, Any]) -> str:
    """A plan (from flows.planning.plan.plan) as a table, with totals."""
    totals = f"{found['reuse']} steps are in the store, {found['run_now']} can run now, {found['depends']} "
    totals += f"depend on those: about {found['tokens']:,} tokens, {_seconds(found['seconds'])} of work and "
    totals += f"{found['bytes']:,} bytes."
    rows = [
        [
            "–" if row["round"] is None else str(row["round"]),
            escape(planned_step(row)),
            row["status"],
            escape(row["why"]),
            f"{row['tokens']:,}",
            _seconds(row["seconds"]),
            gibibytes(row["memory"]),
        ]
        for row in found["steps"]
    ]
    header = ["round", "step", "status", "why", "tokens", "estimated time", "memory"]
    parts = [f"# plan of run {escape(run)}", escape(found["note"] or ""), escape(totals), table(header, rows)]
    parts += [f"**Warning**: {escape(warning)}" for warning in found["warnings"]]
    expected = [[str(cell) for cell in planned_cells(row)] for row in found["rounds"]]
    parts += ["## Pairs of each round", table(PLANNED_COLUMNS, expected)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _seconds(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:,.1f} s"
