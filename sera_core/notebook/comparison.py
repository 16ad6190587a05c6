"""Two runs or two rounds side by side: settings, rounds, and how their policies rank the same held-out pairs.

Left is what `compare` was called on. A difference is left less right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

import pandas as pd

from sera_core.artifacts.differing import Side, difference
from sera_core.artifacts.run_records import RoundManifest
from sera_core.compared_runs import COMPARED, Change, change
from sera_core.guards.shown import shown_line
from sera_core.method.comparison import is_apart
from sera_core.notebook.tables import html, round_row
from sera_core.reporting import words

Pairing = tuple[RoundManifest | None, RoundManifest | None]
"""A round of the left run beside one of the right run; None where there is none."""
NAMES = {"balanced": "balanced accuracy", "accuracy": "accuracy", "reliance": "reliance"}
SHOWN = {
    "round": "round",
    "decision": "decision",
    "human": "human pairs",
    "generated": "generated pairs",
    "generated_share": "generated share",
    "accuracy": "held-out accuracy",
    "heldout/margin": "held-out margin, nats",
}
"""Quantities of `Comparison.rounds` that a notebook shows, and their headings."""
DIFFERENCES = ("accuracy", "heldout/margin")
"""Those of SHOWN whose difference is shown."""
HELDOUT = (
    "left_round", "right_round", "quantity", "left", "right",
    "difference", "low", "high", "pairs", "prompts", "left_out", "distinguishable",
)  # fmt: skip
"""Columns of `Comparison.heldout`."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """What differs between two runs or two rounds; a notebook shows it as tables."""

    left: str
    right: str
    """The names of both sides."""
    settings: pd.DataFrame
    """Settings and content digests that differ: `key`, `left`, `right`, `changes_result`."""
    steps: pd.DataFrame
    """Steps of the last rounds (or of the two rounds) that differ: `role`, `left`, `right`, `why`."""
    metrics: pd.DataFrame
    """Their metrics that differ: `metric`, `left`, `right`."""
    rounds: pd.DataFrame
    """Rounds side by side: `rounds["accuracy"]` has the columns `left`, `right`, `difference`."""
    heldout: pd.DataFrame
    """Each of COMPARED for the policies of two rounds on the held-out pairs that both have: both values, the
    difference with its 95 % interval by prompts (each by itself), and what it rests on. Empty without such
    pairs."""
    notes: tuple[str, ...]
    """The held-out differences in words."""

    def __repr__(self) -> str:
        return "\n".join([f"<{self._heading()}>", *self._settings_lines(), *self.notes])

    def _repr_html_(self) -> str:
        """What a notebook shows: settings that differ, rounds side by side, held-out differences."""
        parts = [f"<p><b>{escape(self._heading())}</b></p>"]
        if len(self.settings):
            parts.append(html(_named(self.settings, self.left, self.right)))
        if len(self.rounds):
            parts.append(html(self._rounds_shown()))
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        return "\n".join(parts)

    def _heading(self) -> str:
        settings = words.plural(len(self.settings), "setting")
        differ = "differs" if len(self.settings) == 1 else "differ"
        return f"{self.left} against {self.right}: {settings} {differ}"

    def _settings_lines(self) -> Iterator[str]:
        for key, left, right in zip(*(self.settings[name] for name in ("key", "left", "right")), strict=True):
            yield shown_line(f"{key}: {left!r} | {right!r}")

    def _rounds_shown(self) -> pd.DataFrame:
        """The quantities of SHOWN, each above the two sides."""
        names = {"left": self.left, "right": self.right, "difference": "difference"}
        wanted = [(quantity, side) for quantity in SHOWN for side in names if (quantity, side) in self.rounds]
        shown = [key for key in wanted if key[1] != "difference" or key[0] in DIFFERENCES]
        table = pd.DataFrame(self.rounds[shown])
        heads = [(SHOWN[quantity], names[side]) for quantity, side in shown]
        table.columns = pd.MultiIndex.from_tuples(heads)
        if "round" not in self.rounds:
            table.insert(0, ("round", ""), self.rounds.index)
        return table


def compare_runs(left: Side, right: Side) -> Comparison:
    """Two runs, each given with its last finished round: rounds of the same number, and the last ones."""
    rounds = left.records.rounds(), right.records.rounds()
    pairings: list[Pairing] = list(zip_longest(rounds[0], rounds[1]))
    numbers = pd.RangeIndex(len(pairings), name="round")
    table = side_by_side(pairings, [name for name in _quantities(pairings) if name != "round"], numbers)
    held = [*pairings]
    if len(rounds[0]) != len(rounds[1]):
        held.append((left.manifest, right.manifest))
    return _comparison((left.records.run, right.records.run), left, right, table, held)


def compare_rounds(left: Side, right: Side) -> Comparison:
    """Two rounds, of one run or of two."""
    pairings: list[Pairing] = [(left.manifest, right.manifest)]
    names = tuple(f"{side.name['run']}:{side.name['round']}" for side in (left, right))
    table = side_by_side(pairings, _quantities(pairings), pd.RangeIndex(1))
    return _comparison((names[0], names[1]), left, right, table, pairings)


def side_by_side(pairings: Sequence[Pairing], quantities: Sequence[str], index: pd.Index) -> pd.DataFrame:
    """Columns (quantity, side): `left`, `right`, and for numbers `difference`, left less right."""
    rows = [[{} if manifest is None else round_row(manifest) for manifest in both] for both in pairings]
    columns: dict[tuple[str, str], pd.Series] = {}
    for name in quantities:
        values = [(left.get(name), right.get(name)) for left, right in rows]
        for at, side in enumerate(("left", "right")):
            columns[name, side] = _column([both[at] for both in values], index)
        less = [_less(a, b) for a, b in values]
        if name != "round" and any(value is not None for value in less):
            columns[name, "difference"] = _column(less, index)
    return pd.DataFrame(columns, index=index)


def _column(values: Sequence[Any], index: pd.Index) -> pd.Series:
    """Whole numbers stay whole beside a round that lacks them."""
    whole = all(value is None or (_is_number(value) and isinstance(value, int)) for value in values)
    return pd.Series(values, index=index, dtype="Int64" if whole else None)


def _quantities(pairings: Sequence[Pairing]) -> list[str]:
    """Names of all columns, in the order of the first round that has them."""
    rows = [round_row(manifest) for both in pairings for manifest in both if manifest is not None]
    return list(dict.fromkeys(name for row in rows for name in row))


def _less(left: Any, right: Any) -> Any:
    return left - right if _is_number(left) and _is_number(right) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _comparison(
    names: tuple[str, str], left: Side, right: Side, rounds: pd.DataFrame, held: Sequence[Pairing]
) -> Comparison:
    found = difference(left, right)
    settings = left.records.configs()[-1].settings
    rows, notes = [], []
    for a, b in held:
        if a is None or b is None or "evidence" not in a.steps or "evidence" not in b.steps:
            continue
        sides = (right.records.store, b), (left.records.store, a)
        changed = change(*sides, settings.decide.feature, settings.evaluate.resamples)
        rows += [] if changed is None else _heldout_rows(a, b, changed)
        notes.append(f"{_rounds_words(a, b)}: {_words(a, b, changed)}")
    return Comparison(
        *names,
        pd.DataFrame(found["config"], columns=["key", "left", "right", "changes_result"], dtype=object),
        pd.DataFrame(found["steps"], columns=["role", "left", "right", "why"], dtype=object),
        pd.DataFrame(found["metrics"], columns=["metric", "left", "right"], dtype=object),
        rounds,
        pd.DataFrame(rows, columns=list(HELDOUT)),
        tuple(notes or ["No two rounds with a trained policy to compare on held-out pairs."]),
    )


def _heldout_rows(left: RoundManifest, right: RoundManifest, changed: Change) -> Iterator[dict[str, Any]]:
    for name in COMPARED:
        estimate = changed.changes[name]
        yield {
            "left_round": left.round,
            "right_round": right.round,
            "quantity": name,
            "left": changed.other[name],
            "right": changed.first[name],
            "difference": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "pairs": estimate.pairs,
            "prompts": estimate.prompts,
            "left_out": changed.left_out,
            "distinguishable": is_apart(estimate),
        }


def _rounds_words(left: RoundManifest, right: RoundManifest) -> str:
    return f"Round {left.round}" if left.round == right.round else f"Round {left.round} | {right.round}"


def _words(left: RoundManifest, right: RoundManifest, changed: Change | None) -> str:
    """The differences of one pair of rounds in a sentence or two."""
    if left.steps["policy"] == right.steps["policy"]:
        return "the same policy"
    if changed is None:
        return "no held-out pair in common, so the policies cannot be compared"
    parts = []
    for name in COMPARED:
        estimate = changed.changes[name]
        if not estimate.measurable:
            continue
        few = ", too few to tell" if estimate.pairs < words.MIN_PAIRS else ""
        apart = "" if is_apart(estimate) or few else ", not distinguishable"
        parts.append(f"{NAMES[name]} {estimate.in_words(signed=True)}{few}{apart}")
    missed = changed.left_out
    left_out = f"; {words.plural(missed, 'held-out pair')} that only one side has left out" if missed else ""
    return f"held-out {'; '.join(parts)}{left_out}"


def _named(table: pd.DataFrame, left: str, right: str) -> pd.DataFrame:
    return table.rename(columns={"left": left, "right": right, "changes_result": "changes results"})
