"""Rounds as a DataFrame, and DataFrames as HTML in which all text is escaped."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from sera_core.artifacts.run_records import RoundManifest
from sera_core.guards.shown import shown_line


def rounds_table(rounds: Sequence[RoundManifest]) -> pd.DataFrame:
    """One row a round: decision, reason, pairs, shares, every single-valued metric (of a rate its value)."""
    return pd.DataFrame([round_row(manifest) for manifest in rounds])


def round_row(manifest: RoundManifest) -> dict[str, Any]:
    """A row of `rounds_table`."""
    metrics = {name: _single(value) for name, value in manifest.metrics.items() if name != "reason"}
    return {
        "round": manifest.round,
        "decision": manifest.decision,
        "reason": manifest.reason,
        "human": manifest.pairs["human"],
        "generated": manifest.pairs["generated"],
        "target_share": manifest.target_share,
        "generated_share": manifest.generated_share,
        "accuracy": manifest.accuracy,
        **metrics,
    }


def html(table: pd.DataFrame) -> str:
    """A table for a notebook: texts whole and escaped, numbers with three digits, a dash for nothing."""
    told = table.map(_cell).rename(columns=lambda name: shown_line(str(name)))
    with pd.option_context("display.max_colwidth", None):
        return f'<div style="overflow-x: auto">{told.to_html(index=False, border=0)}</div>'


def _single(value: object) -> object:
    """A single value for a table cell: of a rate, its value."""
    return value.get("value") if isinstance(value, dict) and "value" in value else value


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"
    return shown_line(str(value))
