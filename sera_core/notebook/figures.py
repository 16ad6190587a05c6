"""Figures of a run and of a round. Only this file and panels.py import matplotlib."""

import io
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure, FigureBase, SubFigure

from sera_core.errors import InputError
from sera_core.notebook import panels
from sera_core.notebook.panels import Rounds

if TYPE_CHECKING:
    from sera_core.artifacts.reading import Round

WIDTH = 11.0
"""Of a whole figure, in inches."""
PANEL = {"margins": panels.margins, "accuracy": panels.accuracy}
PANEL |= {"reliance": panels.reliance, "pairs": panels.pairs}
"""The panels of a run by name: each draws on a part of a figure."""
SHOWN_DPI = 100
"""Dots an inch at which a notebook shows a figure; the picture has twice as many."""


class RunFigure(Figure):
    """A figure that a notebook shows with or without pyplot, with a text for screen readers."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=2 * SHOWN_DPI)
        width, height = (round(SHOWN_DPI * inches) for inches in self.get_size_inches())
        shown = {"width": width, "height": height, "alt": self.description}
        return {"image/png": picture.getvalue(), "text/plain": repr(self)}, {"image/png": shown}

    @property
    def description(self) -> str:
        """The titles of the figure and of its panels."""
        titles = [self.get_suptitle(), *(axes.get_title() for axes in self.axes)]
        return "; ".join(title.replace("\n", " ") for title in titles if title)


def run_figure(run: str, rounds: Rounds, panel: str | None = None) -> RunFigure:
    """All panels of a run, or one of PANEL.

    Raises:
        InputError: no panel has this name.
    """
    if panel is not None:
        if panel not in PANEL:
            raise InputError(f"no panel {panel!r}; there are {', '.join(PANEL)}, and plot() shows them all")
        size = (WIDTH, _height(rounds)) if panel == "margins" else (WIDTH / 2, 3.4)
        figure = RunFigure(figsize=size, layout="constrained")
        PANEL[panel](_parts(figure, 1, 1)[0], rounds)
        return figure
    heights = (_height(rounds), 3.2)
    figure = RunFigure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(panels.plain(f"run {run}"), fontsize=11)
    top, bottom = _parts(figure, 2, 1, height_ratios=heights)
    panels.margins(top, rounds)
    for part, name in zip(_parts(bottom, 1, 3), list(PANEL)[1:], strict=True):
        PANEL[name](part, rounds)
    return figure


def round_figure(round: "Round") -> RunFigure:
    """Margins of a round's human and generated pairs, and what became of every pair and prompt."""
    figure = RunFigure(figsize=(WIDTH, 3.4), layout="constrained")
    figure.suptitle(panels.plain(f"run {round.manifest.run}, round {round.manifest.round}"), fontsize=11)
    ledger = round.ledger()
    for part, draw in zip(_parts(figure, 1, 3), ROUND, strict=True):
        draw(part.subplots(), ledger)
    return figure


ROUND = (panels.human_margins, panels.generated_margins, panels.reasons)


def _parts(figure: FigureBase, rows: int, columns: int, **layout: Any) -> list[SubFigure]:
    return list(figure.subfigures(rows, columns, squeeze=False, **layout).flatten())


def _height(rounds: Rounds) -> float:
    """Of the margins, in inches."""
    return 2.5 if len(rounds.reviewed) <= panels.COLUMNS else 2.0 * -(-len(rounds.reviewed) // panels.COLUMNS)
