"""Panels of a run's figures, drawn from its records. A panel whose records are not there says so in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sera_core.artifacts.run_records import RoundManifest
from sera_core.guards.shown import shown_line
from sera_core.reporting import words
from sera_core.reporting.evidence import features_of
from sera_core.reporting.plots import bins

if TYPE_CHECKING:
    from sera_core.artifacts.reading import Round

INK, KEPT, ROOM, DROPPED = "#1d2430", "#1f5fa8", "#9fbfe0", "#c9cfd6"
LINES = ("#1f5fa8", "#c05a12", "#7b8794", "#2e7d4f", "#8a4fa3")
COLUMNS = 4
"""Histograms of margins in a row."""
FEATURES = len(LINES)
"""Features whose reliance is drawn."""
FATES = (("dropped", DROPPED), ("over_share", ROOM), ("kept", KEPT))
FATE_WORDS = {"kept": "trained on", "over_share": "selected, no room in the mix"}
Margins = dict[str, Float[np.ndarray, " pair"]]
"""By fate: `kept`, `over_share`, `dropped`; in nats."""


@dataclass(frozen=True)
class Rounds:
    """The finished rounds of a run."""

    rounds: Sequence["Round"]
    feature: str
    """The feature that divides the held-out pairs into the sides of balanced accuracy (`decide.feature`)."""
    best: int | None

    @cached_property
    def reviewed(self) -> dict[int, Margins]:
        """Margins of the human pairs of every round that has any that differ, by number."""
        found = {one.manifest.round: margins_of(one.ledger(), "human") for one in self.rounds}
        return {number: margins for number, margins in found.items() if bins(_every(margins)) is not None}

    @property
    def manifests(self) -> list[RoundManifest]:
        """Their records."""
        return [one.manifest for one in self.rounds]


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no formulas, and in legends too."""
    said = shown_line(text).replace("$", r"\$")
    return f" {said}" if said.startswith("_") else said


def margins_of(ledger: pd.DataFrame, origin: str) -> Margins:
    """Ensemble margins of the pairs of an origin that have one, by what became of them."""
    judged = ledger[(ledger["origin"] == origin) & ledger["pair_id"].notna()]
    judged = judged[np.isfinite(judged["ensemble_margin"].astype(float))]
    kept, full = judged["kept"].astype(bool), judged["reason"] == "over_share"
    sides = {"kept": kept, "over_share": full & ~kept, "dropped": ~kept & ~full}
    return {fate: judged.loc[rows, "ensemble_margin"].to_numpy(dtype=float) for fate, rows in sides.items()}


def cut_of(margins: Margins) -> float | None:
    """The smallest margin selected, in nats; None where no pair was dropped, or one with a larger margin."""
    selected = np.concatenate([margins["kept"], margins["over_share"]])
    if not selected.size or not margins["dropped"].size or selected.min() < margins["dropped"].max():
        return None
    return float(selected.min())


def margins(part: SubFigure, rounds: Rounds) -> None:
    """A histogram of the human pairs' margins for each reviewed round, all with the same bins."""
    if not rounds.reviewed:
        _say(part.subplots(), _no_review(rounds))
        return
    edges = bins(np.concatenate([_every(found) for found in rounds.reviewed.values()]))
    rows = -(-len(rounds.reviewed) // COLUMNS)
    columns = min(len(rounds.reviewed), COLUMNS)
    axes = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for place, (number, found) in zip(axes, rounds.reviewed.items(), strict=False):
        _histogram(place, found, edges or [], f"round {number}")
    for empty in axes[len(rounds.reviewed) :]:
        empty.set_visible(False)
    named = {one.get_label(): one for place in axes for one in place.get_legend_handles_labels()[0]}
    part.legend(handles=[*named.values()], loc="outside upper right", ncols=4, fontsize=7, frameon=False)
    part.supxlabel("ensemble margin of human pairs, nats", fontsize=9)
    part.supylabel("pairs", fontsize=9)


def human_margins(axes: Axes, ledger: pd.DataFrame) -> None:
    """One round's human pairs."""
    _margins_of_one(axes, margins_of(ledger, "human"), "human pairs")


def generated_margins(axes: Axes, ledger: pd.DataFrame) -> None:
    """One round's generated pairs."""
    _margins_of_one(axes, margins_of(ledger, "generated"), "generated pairs")


def reasons(axes: Axes, ledger: pd.DataFrame) -> None:
    """What became of the human pairs, of the generated ones and of the prompts without one."""
    counts = ledger.groupby(["reason", "origin"]).size().unstack(fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values().index]
    start = np.zeros(len(counts))
    for origin, colour in (("human", LINES[0]), ("generated", LINES[1])):
        if origin in counts:
            axes.barh(range(len(counts)), counts[origin], left=start, color=colour, label=origin)
            start += counts[origin].to_numpy()
    axes.set_yticks(range(len(counts)), [plain(str(reason)) for reason in counts.index])
    _legend(axes)
    _frame(axes, "pairs and prompts by reason")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def accuracy(part: SubFigure, rounds: Rounds) -> None:
    """Balanced and plain held-out accuracy by round, and the win rate where rounds are decided by it."""
    axes = part.subplots()
    judged = [m for m in rounds.manifests if m.metrics.get("score_metric") == "win_rate"]
    balanced = f"balanced by {words.feature(rounds.feature)}"
    wanted = (
        (balanced, rounds.manifests, f"heldout/reliance/{rounds.feature}/balanced"),
        ("all held-out pairs", rounds.manifests, "heldout/rewards/accuracies"),
        ("win rate over the start policy", judged, "score"),
    )
    drawn = [(name, _rates(manifests, key)) for name, manifests, key in wanted]
    if not any(found for _, found in drawn):
        _say(axes, _no_round(rounds, "held-out accuracy"))
        return
    _series(axes, drawn)
    axes.axhline(0.5, color=INK, linestyle="--", linewidth=0.8)
    best = "" if rounds.best is None else f"\nbest: round {rounds.best}"
    missing = "" if drawn[0][1] else "\nnone balanced: older records"
    _by_round(axes, rounds, f"held-out accuracy{missing or best}")


def reliance(part: SubFigure, rounds: Rounds) -> None:
    """Reliance on the features that the policies rely on most, by round; 0: not used."""
    axes = part.subplots()
    names = list(dict.fromkeys(name for m in rounds.manifests for name in features_of(m.metrics)))
    series = {name: _rates(rounds.manifests, f"heldout/reliance/{name}/reliance") for name in names}
    series = {name: found for name, found in series.items() if found}
    if not series:
        _say(axes, _no_round(rounds, "reliance on features"))
        return
    largest = sorted(series, key=lambda name: -max(abs(rate["value"]) for _, rate, _ in series[name]))
    first = [rounds.feature] if rounds.feature in series else []
    shown = [*first, *(name for name in largest if name not in first)][:FEATURES]
    _series(axes, [(words.feature(name), series[name]) for name in shown])
    axes.axhline(0, color=INK, linestyle="--", linewidth=0.8)
    more = len(series) - len(shown)
    _by_round(axes, rounds, "reliance, held-out pairs" + (f"\n{more} smaller ones not drawn" if more else ""))


def pairs(part: SubFigure, rounds: Rounds) -> None:
    """Pairs trained on by origin, with the generated share of each round."""
    axes = part.subplots()
    if not rounds.rounds:
        _say(axes, _no_round(rounds, "training pairs"))
        return
    numbers = [m.round for m in rounds.manifests]
    start = np.zeros(len(numbers))
    for origin, colour in (("human", LINES[0]), ("generated", LINES[1])):
        counts = np.array([m.pairs[origin] for m in rounds.manifests])
        axes.bar(numbers, counts, bottom=start, color=colour, label=origin, width=0.7)
        start = start + counts
    for m, top in zip(rounds.manifests, start, strict=True):
        if m.target_share > 0:
            axes.annotate(
                words.percent(m.generated_share), (m.round, top), ha="center", va="bottom", fontsize=7
            )
    axes.set_ylim(0, 1.15 * max(1, *start))
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(axes)
    _by_round(axes, rounds, "pairs trained on\n(%: generated share)")


def _margins_of_one(axes: Axes, found: Margins, what: str) -> None:
    every = _every(found)
    edges = bins(every)
    if edges is None:
        why = "none was judged" if not every.size else "all margins are equal: no policy has reviewed them"
        _say(axes, f"{what}: {why}")
        return
    _histogram(axes, found, edges, what)
    axes.set_xlabel("ensemble margin, nats", fontsize=8)
    axes.set_ylabel("pairs", fontsize=8)
    _legend(axes)


def _histogram(axes: Axes, found: Margins, edges: Sequence[float], what: str) -> None:
    """Stacked counts; the outer bins hold what lies beyond. A line marks the smallest margin selected."""
    sides = [np.clip(found[fate], edges[0], edges[-1]) for fate, _ in FATES]
    labels = [FATE_WORDS.get(fate, fate) for fate, _ in FATES]
    axes.hist(sides, bins=list(edges), stacked=True, color=[colour for _, colour in FATES], label=labels)
    if edges[0] <= 0 <= edges[-1]:
        axes.axvline(0, color=INK, linestyle="--", linewidth=0.8)
    cut = cut_of(found)
    if cut is not None:
        axes.axvline(cut, color=LINES[1], linewidth=1.2, label="smallest margin selected")
    kept, every = len(found["kept"]), len(_every(found))
    _frame(axes, f"{what}: {kept:,} of {every:,} trained on")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _every(found: Margins) -> Float[np.ndarray, " pair"]:
    return np.concatenate(list(found.values()))


Rates = list[tuple[int, dict[str, Any], bool]]
"""(round, rate, whether it was promoted) of the rounds that have the rate."""


def _rates(manifests: Sequence[RoundManifest], key: str) -> Rates:
    found = ((m.round, m.metrics.get(key), m.decision == "promote") for m in manifests)
    return [(number, rate, up) for number, rate, up in found if rate and rate["value"] is not None]


def _series(axes: Axes, series: Sequence[tuple[str, Rates]]) -> None:
    """A line with intervals for each; a hollow dot is a round that was not promoted."""
    handles, present = [], [(name, found) for name, found in series if found]
    for place, (name, found) in enumerate(present):
        shift = 0.06 * (place - (len(present) - 1) / 2)
        x = np.array([number for number, _, _ in found]) + shift
        values, colour = [rate["value"] for _, rate, _ in found], LINES[place]
        axes.plot(x, values, color=colour, linewidth=1.4)
        faces = [colour if up else "white" for _, _, up in found]
        axes.scatter(x, values, s=22, facecolors=faces, edgecolors=colour, zorder=3)
        whole = [(at, rate) for at, (_, rate, _) in zip(x, found, strict=True) if rate.get("low") is not None]
        whole = [(at, rate) for at, rate in whole if rate.get("high") is not None]
        if whole:
            ends = ([rate[end] for _, rate in whole] for end in ("low", "high"))
            axes.vlines([at for at, _ in whole], *ends, colors=colour, linewidth=1.2)
        handles.append(Line2D([], [], color=colour, marker="o", markersize=4, label=plain(name)))
    if any(not up for _, found in present for _, _, up in found):
        dot = Line2D([], [], color=INK, marker="o", markersize=4, linestyle="", label="not promoted")
        dot.set_markerfacecolor("white")
        handles.append(dot)
    _legend(axes, handles)


def _legend(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """Below the drawing, where it covers nothing."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
    axes.legend(handles=handles, ncols=2, fontsize=7, frameon=False, **below)


def _by_round(axes: Axes, rounds: Rounds, title: str) -> None:
    _frame(axes, title)
    numbers = [m.round for m in rounds.manifests]
    axes.set_xticks(numbers[:: -(-len(numbers) // 10)])
    axes.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    axes.set_xlabel("round", fontsize=8)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title("\n".join(map(plain, title.split("\n"))), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: Axes, text: str) -> None:
    """Words where nothing can be drawn."""
    axes.set_axis_off()
    lines = "\n".join(wrap(plain(text), 38))
    axes.text(0.5, 0.5, lines, ha="center", va="center", fontsize=9)


def _no_review(rounds: Rounds) -> str:
    if len(rounds.rounds) == 0:
        return _no_round(rounds, "margins")
    return "No reviewed round yet: round 0 has no reviewer and keeps every human pair."


def _no_round(rounds: Rounds, what: str) -> str:
    if len(rounds.rounds) == 0:
        return f"No finished round yet, so no {what}."
    return f"These rounds have no {what} in their records."
