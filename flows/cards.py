"""What a person sees in Prefect: a markdown card a round, and an index of the run on its parent flow."""

import re
from typing import Any

from sera_core.artifacts.runs import RoundManifest, RunStore


def key_of(run: str, what: str) -> str:
    """An artifact key: they are global across runs, lower case with dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{run}-{what}".lower()).strip("-")


def round_card(manifest: RoundManifest) -> str:
    """One round: decision, evidence, pairs kept and dropped, artifacts."""
    m = manifest.metrics
    rows = [
        ("pairs trained on", f"{manifest.pairs['human']} human, {manifest.pairs['generated']} generated"),
        ("generated share", f"{manifest.generated_share:.2f} of {manifest.target_share:.2f} asked"),
        ("held-out accuracy", interval(m.get("heldout/rewards/accuracies"))),
        ("change since the head", interval(m.get("heldout/accuracy_change"))),
        ("mean held-out margin (nats)", interval(m.get("heldout/margin"))),
        ("mean margin of pairs trained on (nats)", interval(m.get("trained/margin"))),
        ("KL to the start (nats a response)", interval(m.get("samples/kl_reference"))),
        ("tokens of a sampled answer", interval(m.get("samples/tokens"))),
    ]
    dropped = {
        name: count for name, count in m.items() if name.startswith(("human/", "generated/")) and count
    }
    lines = [
        f"# {manifest.run}, round {manifest.round}: {manifest.decision}",
        "",
        f"{escape(manifest.reason)}" + (f" — **{manifest.stop_reason}**" if manifest.stop_reason else ""),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "| pairs by reason | |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(dropped.items())),
        "",
        "| artifact | sha256 | bytes |",
        "|---|---|---|",
        *(
            f"| {role} | `{a['sha256'][:12]}` | {a['bytes']:,} |"
            for role, a in sorted(manifest.artifacts.items())
        ),
    ]
    return "\n".join(lines)


def index_card(records: RunStore) -> str:
    """The run so far, a line a round."""
    history = records.history()
    lines = [
        f"# run {records.run}",
        "",
        f"store `{escape(records.store.url)}`; stop reason: {records.stop_reason() or 'open'}; "
        f"head: {_number(history.head)}; best round: {_number(history.best)}",
        "",
        "| round | decision | human | generated | held-out accuracy | card |",
        "|---|---|---|---|---|---|",
    ]
    for r in history.rounds:
        accuracy = interval(r.metrics.get("heldout/rewards/accuracies"))
        card = key_of(records.run, f"round-{r.round}")
        lines.append(
            f"| {r.round} | {r.decision} | {r.pairs['human']} | {r.pairs['generated']} "
            f"| {accuracy} | `{card}` |"
        )
    return "\n".join(lines)


def interval(rate: dict[str, Any] | None) -> str:
    """A value with its interval, or a dash where it was not measured."""
    if not rate or rate.get("value") is None:
        return "–"
    if rate.get("low") is None:
        return f"{rate['value']:.3f} (n = {rate['n']})"
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] (n = {rate['n']})"


def escape(text: str) -> str:
    """Text that stays text in markdown and HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text)


def _number(manifest: RoundManifest | None) -> str:
    return "none" if manifest is None else str(manifest.round)
