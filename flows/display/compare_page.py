"""A comparison of arms as one HTML page. No Prefect, no torch."""

from pathlib import Path
from typing import Any

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
from flows.display.run_report import refuse_foreign
from flows.judged_arms import JudgedArms
from sera_core.arms import ARMS
from sera_core.artifacts.folders import write_whole
from sera_core.reporting import words
from sera_core.reporting.pages import render
from sera_core.reporting.plots import Point, Series, paths

PAGE = "compare.html"
COLOURS = (
    "#1f5fa8", "#c05a12", "#2e7d4f", "#8e44ad", "#a87b00", "#c62839", "#17838f", "#7f5539", "#d0589a",
    "#5c6b73", "#3f6d12", "#4b3fa0", "#b3541e", "#00796b", "#ad1457", "#6d4c41", "#455a9b",
    "#5d7a00", "#99004d", "#006080", "#7a3e00", "#33691e", "#5e35b1", "#8d6e00",
)  # fmt: skip
"""One for each arm, in the order they are named."""


def check_page(out: Path) -> None:
    """Refuse a folder that the page cannot be written to.

    Raises:
        InputError: it is a file, cannot be created, or has a `compare.html` that is not ours.
    """
    refuse_foreign(out, [PAGE])


def write_page(found: Compared, name: str, out: Path, judged: JudgedArms | None = None) -> Path:
    """Write `out`/compare.html; returns its path.

    Raises:
        InputError: as `check_page`.
    """
    check_page(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / PAGE, page_of(found, name, judged).encode())
    return out / PAGE


def page_of(found: Compared, name: str, judged: JudgedArms | None = None) -> str:
    """The page: a row and a path for each arm, its difference from the first, and what a judge says."""
    seeds = list(found.arms[found.first])
    return render(
        "compare.html.j2",
        name=name,
        first=found.first,
        lead=f"{words.plural(len(found.arms), 'arm')} of one experiment, each trained for the tokens of "
        f"{found.first}, round by round; means over {words.plural(len(seeds), 'seed')}.",
        columns=compare_words.COLUMNS,
        rows=[[compare_words.cell(value) for value in row] for row in compare_words.rows(found)],
        note=compare_words.measured_on(found),
        differences=compare_words.differences(found),
        alarms=list(alarm_words(found.alarms)),
        judged=None if judged is None else _judged(judged),
        unequal=list(compare_words.unequal(found)),
        plot=paths(_series(found), "reliance", "balanced accuracy"),
        feature=words.feature(found.feature),
        arms=[{"name": arm, "shows": ARMS[arm].shows, "source": ARMS[arm].source} for arm in found.arms],
        runs=", ".join(compare_words.run_names(found)),
        colours=COLOURS[: len(found.arms)],
    )


def _judged(found: JudgedArms) -> dict[str, Any]:
    return {
        "lines": list(judge_lines(found)),
        "tables": [(PAIR_COLUMNS, pair_rows(found)), (STRENGTH_COLUMNS, strength_rows(found))],
    }


def _series(found: Compared) -> list[Series]:
    return [
        Series(arm, f"arm-{number}", points)
        for number, arm in enumerate(found.arms)
        if (points := _points(found, arm))
    ]


def _points(found: Compared, arm: str) -> list[Point]:
    return [
        Point(round["reliance"], round["balanced"])
        for round in found.by_round(arm)
        if round["reliance"] is not None and round["balanced"] is not None
    ]
