"""Do the selection and the policy favour longer answers? Shares of longer answers, and the alarm in words."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sera_core.method.diagnostics import longer_share
from sera_core.method.panel import TOKENS
from sera_core.reporting import words
from sera_core.reporting.evidence import Line, rate_line
from sera_core.reporting.files import RoundFiles, Row

_PARTS = (
    ("counter_change", "accuracy where the chosen answer has less of it, change", "fell", -1),
    ("aligned_change", "accuracy where the chosen answer has more of it, change", "did not fall", 0),
    (
        "kept_share_excess",
        "share of chosen answers with more of it: selected pairs minus all pairs",
        "is larger",
        1,
    ),
)


def shares(
    files: RoundFiles, ledger: Sequence[Row], evidence: dict[str, Any] | None
) -> list[tuple[str, dict[str, Any]]]:
    """Share of pairs whose chosen answer is the longer one: all, trained-on and held-out ones, by origin."""
    found = []
    kept = {row["pair_id"]: row["reason"] == "relabelled" for row in ledger if row["kept"]}
    for role, name in (("scored", "human pairs"), ("responses", "generated pairs")):
        rows = list(files.rows(role, "scored.parquet", ["pair_id", "chosen_tokens", "rejected_tokens"]))
        if rows:
            turned = [kept.get(row["pair_id"], False) for row in rows]
            differences = np.array([_difference(row) for row in rows])
            trained = np.where(turned, -differences, differences)[[row["pair_id"] in kept for row in rows]]
            found += [(f"all {name}", _share(differences)), (f"{name} trained on", _share(trained))]
    if evidence is not None:
        found += [
            ("held-out pairs", evidence["heldout/chosen_longer"]),
            ("held-out pairs, by the policy's own preference", evidence["heldout/preferred_longer"]),
        ]
    return found


def alarm_parts(alarm: dict[str, Any] | None) -> list[Line]:
    """The three conditions of the alarm: what was measured, and whether it holds.

    For each feature that raised it; for length if none did. Older records have length only.
    """
    if alarm is None:
        return []
    if "alarms" not in alarm:
        return _parts("length in tokens", alarm)
    shown = alarm["raised"] or [name for name in (TOKENS,) if name in alarm["alarms"]]
    return [line for name in shown for line in _parts(words.feature(name), alarm["alarms"][name])]


def _parts(feature: str, alarm: dict[str, Any]) -> list[Line]:
    made = []
    for key, name, claim, sign in _PARTS:
        line = rate_line(f"{feature}: {name}", alarm[key], signed=True)
        note = line.note or _holds(alarm[key], claim, sign)
        made.append(Line(line.name, line.value, line.n, note))
    return made


def alarm_words(alarm: dict[str, Any] | None) -> str:
    """The alarm's result in a sentence."""
    if alarm is None:
        return "Not measured: there is no earlier head to compare with."
    if "alarms" not in alarm:
        return words.ALARMS[alarm["reason"]]
    return f"{'Raised' if alarm['raised'] else 'Not raised'}: {alarm['sentence']}."


def _holds(rate: dict[str, Any], claim: str, sign: int) -> str:
    if rate["low"] is None or rate["high"] is None:
        return "not measured"
    holds = {-1: rate["high"] < 0, 0: not rate["high"] < 0, 1: rate["low"] > 0}[sign]
    return f"{claim}: {'holds' if holds else 'does not hold'}"


def _difference(row: Row) -> int:
    return row["chosen_tokens"] - row["rejected_tokens"]


def _share(differences: np.ndarray) -> dict[str, Any]:
    share = asdict(longer_share(differences.astype(np.int64), np.zeros(len(differences), dtype=np.int64)))
    return {name: None if value != value else value for name, value in share.items()}
