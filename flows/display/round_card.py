"""The card of a round in Prefect, as markdown made from records."""

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flows.display.dropped import KEPT, over_share_words
from flows.display.markdown import escape, quote, table, verbatim
from flows.display.plots import image
from flows.display.run_report import trends
from flows.display.run_view import uri_of
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.reporting import words
from sera_core.reporting.examples import ROLES, examples
from sera_core.reporting.files import RoundFiles, Row
from sera_core.reporting.round_page import histograms, title_of

METRICS = (
    ("held-out accuracy", "heldout/rewards/accuracies", 3),
    ("paired change since the previous policy", "heldout/accuracy_change", 3),
    ("held-out margin, nats", "heldout/margin", 3),
    ("margin of human pairs trained on, nats", "trained/margin", 3),
    ("held-out: prefers the longer answer", "heldout/preferred_longer", 3),
    ("held-out: reliance on length in tokens (0: unused)", "heldout/reliance/tokens/reliance", 3),
    ("KL to the start policy, nats per answer", "samples/kl_reference", 3),
    ("tokens per sampled answer", "samples/tokens", 1),
    ("training loss", "train_loss", 4),
    ("human pairs trained on", "pairs/human", 0),
    ("generated pairs trained on", "pairs/generated", 0),
    ("generated share", "generated_share", 3),
    ("target generated share", "target_share", 3),
    ("tokens of work", "tokens", 0),
    ("seconds of work", "seconds", 1),
)
"""Metrics compared with the previous round: name, key in the manifest, digits."""
LEDGER = ("pair_id", "origin", "stage", "ensemble_margin", "kept", "reason")


def round_card(records: RunStore, manifest: RoundManifest, show_text: bool) -> str:
    """A round in markdown: decision, metrics, plots, pairs by reason, artifacts."""
    rounds = records.rounds()[: manifest.round + 1]
    steps = {role: ref for role, ref in manifest.steps.items() if role in ROLES}
    files = RoundFiles({role: Artifact(records.store, ref) for role, ref in steps.items()})
    ledger = list(files.rows("mixture", "ledger.parquet", LEDGER))
    parts = [
        f"# {escape(manifest.run)}, round {manifest.round}: {manifest.decision}",
        *_decision(manifest),
        "## Metrics",
        _metrics(manifest, rounds[-2] if len(rounds) > 1 else None),
        *_plots(rounds, ledger),
        "## Pairs",
        table(["pairs", "reason", "meaning", "count"], _counts(ledger)),
        *_over_share(manifest),
        *(_samples(files, ledger) if show_text else []),
        "## Artifacts",
        verbatim(_artifacts(records, manifest)),
        "All rounds as HTML pages:",
        verbatim([command(records, "report", "--out report")]),
    ]
    return "\n\n".join(parts) + "\n"


def _decision(manifest: RoundManifest) -> list[str]:
    lines = [
        f"**{manifest.decision}**: {words.DECISIONS[manifest.decision]}. Why: {escape(manifest.reason)}."
    ]
    if manifest.stop_reason is not None:
        lines.append(f"The run stops ({escape(manifest.stop_reason)}): {stop_words(manifest.stop_reason)}.")
    alarm: str | None = manifest.metrics.get("alarm")
    if alarm is not None:
        lines.append(f"Amplification alarm: {escape(alarm_words(manifest))}")
    return lines


def alarm_words(manifest: RoundManifest) -> str:
    """The alarm's result in a sentence, with its numbers if they were recorded."""
    alarm: str = manifest.metrics["alarm"]
    reason: str | None = manifest.metrics.get("alarm_reason")
    if reason is None:
        return words.ALARMS.get(alarm, alarm)
    return f"{'Raised' if alarm == 'amplified' else 'Not raised'}: {reason}."


def stop_words(stop_reason: str) -> str:
    """The meaning of a stop reason."""
    return escape(words.STOPS.get(stop_reason, stop_reason))


def _metrics(manifest: RoundManifest, before: RoundManifest | None) -> str:
    """A table of the metrics measured in this round or the previous one."""
    rows = []
    for name, key, digits in METRICS:
        now, then = ({} if m is None else m.metrics.get(key) for m in (manifest, before))
        if _value(now) is None and _value(then) is None:
            continue
        change = "–"
        if _value(now) is not None and _value(then) is not None and not key.endswith("_change"):
            change = words.number(_value(now) - _value(then), digits, signed=True)
        rows.append([name, _shown(now, digits), change, _shown(_value(then), digits)])
    return table(["metric", "this round", "change", "previous round"], rows)


def _value(metric: Any) -> Any:
    value = metric.get("value") if isinstance(metric, dict) else metric
    return value if words.finite(value) else None


def _shown(metric: Any, digits: int) -> str:
    if isinstance(metric, dict):
        return with_interval(metric, digits)
    return words.number(metric, digits) if digits else words.count(metric)


def with_interval(rate: dict[str, Any] | None, digits: int = 3) -> str:
    """A value with its interval and number of observations; a dash if it was not measured."""
    if rate is None or rate.get("value") is None:
        return "–"
    return f"{words.interval(rate, digits)} (n = {rate['n']:,})"


def _plots(rounds: Sequence[RoundManifest], ledger: Sequence[Row]) -> list[str]:
    drawn = [image(plot, caption) for plot, caption in trends(rounds)]
    margins = dict(histograms(ledger)).get("human")
    if margins is not None:
        drawn.append(image(margins, "Ensemble margins of this round's human pairs, trained on and dropped."))
    return drawn


def _counts(ledger: Sequence[Row]) -> list[list[str]]:
    """Pairs and prompts in the ledger by reason, kept first; those of the other sides last."""
    counts: Counter[tuple[str, str, str]] = Counter(
        (row["origin"], row["stage"].partition("_")[2], row["reason"]) for row in ledger
    )
    rows = []
    for (origin, side, reason), count in counts.items():
        named = f"{origin}, {words.SIDES.get(side, side)}" if side else origin
        cells = [escape(named), escape(reason), escape(words.REASONS.get(reason, reason)), f"{count:,}"]
        rows.append(((side, origin == "generated", reason not in KEPT, -count, reason), cells))
    return [cells for _, cells in sorted(rows)]


def _over_share(manifest: RoundManifest) -> list[str]:
    over = over_share_words(manifest)
    return [] if over is None else [f"**Warning**: {escape(over)}."]


def _samples(files: RoundFiles, ledger: Sequence[Row]) -> list[str]:
    shown = []
    for pair in examples(files, ledger):
        facts = f"ensemble margin {words.number(pair['ensemble_margin'], 2, signed=True)} nats"
        facts += f", by the head alone {words.number(pair['margin'], 2, signed=True)}; {pair['reason']}"
        shown += [f"**{title_of(pair)}**", escape(f"pair {pair['pair_id']}: {facts}")]
        for side in ("prompt", "chosen", "rejected"):
            tokens = f" ({words.plural(pair[f'{side}_tokens'], 'token')})" if side != "prompt" else ""
            shown += [f"*{side}*{tokens}", quote(pair[side])]
    return ["## Example pairs", *shown] if shown else []


def _artifacts(records: RunStore, manifest: RoundManifest) -> list[str]:
    lines = []
    for role, place in sorted(manifest.artifacts.items()):
        lines.append(f"{role:10} {place['bytes']:>15,} bytes  sha256 {place['sha256']}")
        lines.append(f"{'':10} {uri_of(records.store, place)}")
    return lines


def command(records: RunStore, name: str, options: str = "") -> str:
    """A `sera` command line for the run."""
    named = ["sera", name, shlex.quote(records.run), "--store", shlex.quote(records.store.url)]
    return " ".join([*named, options]).rstrip()
