"""Plots as inline SVG, styled by the page's own style sheet: no library, no script, the same bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape

from sera_core.guards.shown import shown_line

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 36
LABELS = 290
"""Width of the row labels of a plot of intervals."""


@dataclass(frozen=True)
class Point:
    """A value at a place, with its interval where there is one."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points under one name, drawn in one style class (`a`, `b` or `c`)."""

    name: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Scale:
    """From values to places in the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


LEAST_SPAN = 1e-3
"""What an axis covers at least, as a share of its largest value."""
NO_SPAN = 1e-300
"""Below this a step has no power of ten."""


def nice_step(span: float, pieces: int) -> float:
    """A round step (1, 2, 2.5 or 5 times a power of ten) that cuts `span` into about `pieces`."""
    raw = span / pieces if span > NO_SPAN else 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * (1 - 1e-9))


def ticks(low: float, high: float, pieces: int = 5) -> list[float]:
    """Round values that cover [low, high]; a range that floating point hardly resolves there is widened."""
    step = nice_step(max(high - low, 1e-9 * max(abs(low), abs(high))), pieces)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [number * step for number in range(first, last + 1)]


def axis_ticks(low: float, high: float, pieces: int = 5) -> list[float]:
    """The same for an axis: values that its labels can hardly tell apart get some room."""
    room = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    return ticks(low - room / 2, high + room / 2, pieces) if room > 0 else ticks(low, high, pieces)


def bins(values: Float[np.ndarray, " value"]) -> list[float] | None:
    """Round edges of about 24 bins; the outer ones also hold outliers of many values. None without spread."""
    if not values.size or values.min() == values.max():
        return None
    low, high = np.quantile(values, (0.005, 0.995)) if values.size >= 200 else (values.min(), values.max())
    return ticks(float(low), float(high), 24)


def histogram(kept: Sequence[float], dropped: Sequence[float], label: str) -> Markup | None:
    """Counts of values of pairs trained on and dropped, stacked; outer bins hold what lies beyond.

    None without spread.
    """
    sides = [np.asarray(values, dtype=np.float64) for values in (kept, dropped)]
    if (edges := bins(np.concatenate(sides))) is None:
        return None
    inside = [np.clip(side, edges[0], edges[-1]) for side in sides]
    heights = [np.histogram(side, bins=np.asarray(edges))[0].tolist() for side in inside]
    tallest = max(a + b for a, b in zip(*heights, strict=True))
    x, y = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT), _y_scale(0, tallest)
    bars = []
    for number, (k, d) in enumerate(zip(*heights, strict=True)):
        at, width = x(edges[number]), x(edges[number + 1]) - x(edges[number])
        bars += [_bar(at, width, y(d), y(0), "dropped"), _bar(at, width, y(d + k), y(d), "kept")]
    zero = [_line(x(0), TOP, x(0), HEIGHT - BOTTOM, "zero")] if edges[0] <= 0 <= edges[-1] else []
    legend = _legend([("kept", f"trained on ({len(kept):,})"), ("dropped", f"dropped ({len(dropped):,})")])
    counts = [value for value in ticks(0, tallest, 4) if value == int(value)]
    return _svg(label, [*_y_axis(y, counts), *bars, *zero, *_x_axis(x, edges, label), *legend])


def lines(series: Sequence[Series], x_label: str, label: str, mark: float | None = None) -> Markup | None:
    """Values over rounds or steps, intervals as bars; `mark` draws a dashed line. None without a point."""
    points = [point for one in series for point in one.points]
    if not points:
        return None
    ends = [end for p in points for end in (p.value, p.low, p.high) if end is not None]
    ends += [] if mark is None else [mark]
    y_ticks = axis_ticks(min(ends), max(ends))
    y = _y_scale(y_ticks[0], y_ticks[-1])
    first, last = min(p.x for p in points), max(p.x for p in points)
    pad = 0.5 if last - first < 12 else 0.02 * (last - first)
    x = Scale(first - pad, last + pad, LEFT, WIDTH - RIGHT)
    places = [v for v in ticks(first, last, 8) if v == int(v) and first <= v <= last] or [first]
    drawn = [] if mark is None else [_line(LEFT, y(mark), WIDTH - RIGHT, y(mark), "mark")]
    for number, one in enumerate(series):
        shift = 5 * (number - (len(series) - 1) / 2) if last - first < 12 else 0.0
        drawn += _series(one, x, y, shift)
    legend = _legend([(one.style, one.name) for one in series])
    return _svg(label, [*_y_axis(y, y_ticks), *_x_axis(x, places, x_label), *drawn, *legend])


def intervals(rows: Sequence[tuple[str, str, Point]], label: str, mark: float | None = None) -> Markup | None:
    """One row a quantity: (name, style class, value with interval). None without a row."""
    if not rows:
        return None
    ends = [end for _, _, p in rows for end in (p.value, p.low, p.high) if end is not None]
    ends += [] if mark is None else [mark]
    places = axis_ticks(min(ends), max(ends), 6)
    height = 12 + 24 * len(rows) + BOTTOM
    x = Scale(places[0], places[-1], LABELS, WIDTH - RIGHT - 10)
    drawn = [] if mark is None else [_line(x(mark), 6, x(mark), height - BOTTOM, "mark")]
    for number, (name, style, point) in enumerate(rows):
        at = 20 + 24 * number
        drawn.append(_text(LABELS - 14, at + 4, name, "end"))
        if point.low is not None and point.high is not None:
            drawn.append(_line(x(point.low), at, x(point.high), at, f"whisker {style}"))
        drawn.append(_dot(x(point.value), at, style))
    return _svg(label, [*_x_axis(x, places, label, height), *drawn], height)


TALL = 400
"""Height of a plot of paths."""
LEGEND_WIDTH = 5
"""Entries of its legend in one row."""


def paths(series: Sequence[Series], x_label: str, y_label: str) -> Markup | None:
    """Arrows from point to point of each series; points are numbered from 0. None without a point."""
    points = [point for one in series for point in one.points]
    if not points:
        return None
    x_ticks, y_ticks = (
        axis_ticks(min(values), max(values)) for values in ([p.x for p in points], [p.value for p in points])
    )
    rows = [series[start : start + LEGEND_WIDTH] for start in range(0, len(series), LEGEND_WIDTH)]
    top = TOP + 18 * len(rows)
    x, y = (
        Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT),
        Scale(y_ticks[0], y_ticks[-1], TALL - BOTTOM, top),
    )
    drawn = [_text(LEFT, top - 8, y_label, style="name")]
    drawn += [part for one in series for part in _path(one, x, y)]
    for number, row in enumerate(rows):
        drawn += _legend([(one.style, one.name) for one in row], 18 * number)
    label = f"{y_label} against {x_label}"
    return _svg(label, [*_y_axis(y, y_ticks), *_x_axis(x, x_ticks, x_label, TALL), *drawn], TALL)


def _path(one: Series, x: Scale, y: Scale) -> list[str]:
    at = [(x(p.x), y(p.value)) for p in one.points]
    drawn = [part for start, end in pairwise(at) for part in _arrow(start, end, one.style)]
    drawn += [_dot(a, b, one.style) for a, b in at]
    return drawn + [_text(a + 6, b - 5, str(number)) for number, (a, b) in enumerate(at)]


def _arrow(start: tuple[float, float], end: tuple[float, float], style: str) -> list[str]:
    """A line with a head that touches the dot at its end; nothing where both dots meet."""
    across, down = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, down)
    if length < 8:
        return []
    u, v = across / length, down / length
    tip, back = (end[0] - 4 * u, end[1] - 4 * v), (end[0] - 11 * u, end[1] - 11 * v)
    corners = [tip, (back[0] - 4 * v, back[1] + 4 * u), (back[0] + 4 * v, back[1] - 4 * u)]
    head = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return [_line(*start, *back, f"line {style}"), f'<polygon class="dot {style}" points="{head}"/>']


def _series(one: Series, x: Scale, y: Scale, shift: float) -> list[str]:
    at = [(x(p.x) + shift, y(p.value), p) for p in one.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in at)
    drawn = [f'<polyline class="line {one.style}" points="{path}"/>'] if len(at) > 1 else []
    for a, _, p in at:
        if p.low is not None and p.high is not None:
            drawn.append(_line(a, y(p.low), a, y(p.high), f"whisker {one.style}"))
    return drawn + ([_dot(a, b, one.style) for a, b, _ in at] if len(at) <= 60 else [])


def _y_scale(low: float, high: float) -> Scale:
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def _y_axis(y: Scale, values: Sequence[float]) -> list[str]:
    drawn = []
    for value, label in zip(values, _labels(values), strict=True):
        if y.low - 1e-9 <= value <= y.high + 1e-9:
            drawn += [
                _line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid"),
                _text(LEFT - 6, y(value) + 4, label, "end"),
            ]
    return drawn


def _x_axis(x: Scale, values: Sequence[float], label: str, height: int = HEIGHT) -> list[str]:
    shown = values[:: math.ceil(len(values) / 9)]
    drawn = [_line(x.start, height - BOTTOM, x.end, height - BOTTOM, "axis")]
    drawn += [
        _text(x(value), height - BOTTOM + 15, said, "middle")
        for value, said in zip(shown, _labels(shown), strict=True)
    ]
    return [*drawn, _text((x.start + x.end) / 2, height - 4, label, "middle", "name")]


def _legend(entries: Sequence[tuple[str, str]], down: float = 0) -> list[str]:
    drawn, at = [], float(LEFT)
    for style, name in entries:
        drawn += [_bar(at, 10, down + 4, down + 14, style), _text(at + 15, down + 13, name)]
        at += 32 + 6.8 * len(name)
    return drawn


def _labels(values: Sequence[float]) -> list[str]:
    """Labels of an axis, with as many digits as tell them apart."""
    labels: list[str] = []
    for digits in range(4, 12):
        labels = [_short(value, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _short(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value:,.{digits - 4}f}"
    return "0" if float(f"{value:.9f}") == 0 else text.replace("-", "−")


def _bar(x: float, width: float, top: float, bottom: float, style: str) -> str:
    if bottom - top <= 0:
        return ""
    return (
        f'<rect class="bar {style}" x="{x:.1f}" y="{top:.1f}" '
        f'width="{max(width - 1, 1):.1f}" height="{bottom - top:.1f}"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float, style: str) -> str:
    return f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    said = escape(shown_line(text))
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>'


def _svg(label: str, drawn: Sequence[str], height: int = HEIGHT) -> Markup:
    body = "\n".join(part for part in drawn if part)
    said = escape(shown_line(label))
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{said}">\n{body}\n</svg>')
