"""Histories of a run's held-out signal, played many times with noise: what does the decision make of them?

    python -m tests.sera_core.method.histories [COPIES [SIZE …]]    1,000 copies, all sizes

A history is the true balanced accuracy of round 0, 1, …; the same levels come whatever is decided. A held-out
pair has a difficulty that all rounds share, and pairs of one prompt have part of it in common:

    margin = Φ⁻¹(level of its side) + √ρ (√a prompt + √(1−a) pair) + √(1−ρ) round,    all standard normal

The sides are apart by 0.1: the feature favours the better answer in half of the pairs, the worse one in 35 %.
ρ is an assumption about how alike two rounds of one run are; the table is for several.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from sera_core.method.best import Best, choosing_half
from sera_core.method.convergence import Heldout, Rule, compare_round
from sera_core.method.decisions import decide_round, run_state

SIDES = {1.0: (0.50, 0.05), -1.0: (0.35, -0.05), 0.0: (0.15, 0.0)}
"""Sign of the feature's difference: share of the pairs, and how far its accuracy is from the level."""


@dataclass(frozen=True)
class History:
    """True levels by round, and what is to be found in them."""

    levels: tuple[float, ...]
    improves_until: int = 0
    """The last round that is truly better than the one before; a stop before it is wrong."""
    falls_at: int | None = None
    """The first round that is truly worse than a promoted one should be."""
    within: int = 2
    """Rounds, from that one on, in which it is to be found."""


HISTORIES = {
    "improving by 0.03 a round": History((0.60, 0.63, 0.66, 0.69, 0.72, 0.75, 0.78, 0.81), improves_until=7),
    "plateau after round 2": History((0.60, 0.66, 0.70, 0.70, 0.70, 0.70, 0.70, 0.70), improves_until=2),
    "plateau, then drop of 0.10": History((0.60, 0.66, 0.70, 0.70, 0.60, 0.60, 0.60), 2, falls_at=4),
    "plateau, then drop of 0.05": History((0.60, 0.66, 0.70, 0.70, 0.65, 0.65, 0.65), 2, falls_at=4),
    "one bad round, then recovery": History((0.60, 0.66, 0.58, 0.70, 0.73, 0.76, 0.79), 6, falls_at=2),
    "decline of 0.03 a round": History((0.70, 0.67, 0.64, 0.61, 0.58, 0.55, 0.52), 0, falls_at=1, within=4),
}


@dataclass(frozen=True)
class Size:
    """A held-out side."""

    pairs: int
    prompts: int
    alike: float = 0.8
    """ρ: correlation of a pair's latent margin between two rounds."""
    of_prompt: float = 0.2
    """a: share of a pair's difficulty that its prompt's pairs have in common."""


SIZES = {
    "demo: 60 pairs of 60 prompts": Size(60, 60),
    "1,000 pairs of 800 prompts": Size(1000, 800),
    "1,000 pairs of 800 prompts, ρ 0.5": Size(1000, 800, alike=0.5),
    "1,000 pairs of 800 prompts, ρ 0.95": Size(1000, 800, alike=0.95),
    "1,000 pairs of 50 prompts": Size(1000, 50, of_prompt=0.02),
}


@dataclass(frozen=True)
class Played:
    """One noisy copy of a history."""

    verdicts: tuple[str, ...]
    """Of round 1, 2, …, up to the end or the stop."""
    decisions: tuple[str, ...]
    """Of round 0, 1, …"""
    stop_reason: str | None
    best: Best
    """As the last judged round found it."""


def correct_by_round(levels: tuple[float, ...], size: Size, rng: np.random.Generator):
    """Correctness of each round's margins, [round, pair], with the feature's differences and the prompts."""
    signs = np.array(list(SIDES))
    side = rng.choice(len(SIDES), size.pairs, p=[share for share, _ in SIDES.values()])
    groups = np.concatenate(
        [np.arange(size.prompts), rng.integers(0, size.prompts, size.pairs - size.prompts)]
    )
    common = np.sqrt(size.of_prompt) * rng.normal(size=size.prompts)[groups]
    difficulty = common + np.sqrt(1 - size.of_prompt) * rng.normal(size=size.pairs)
    offsets = np.array([offset for _, offset in SIDES.values()])
    places = np.array([[NormalDist().inv_cdf(level + offset) for offset in offsets] for level in levels])
    noise = rng.normal(size=(len(levels), size.pairs))
    margins = places[:, side] + np.sqrt(size.alike) * difficulty + np.sqrt(1 - size.alike) * noise
    return (margins > 0).astype(np.float64), signs[side], groups


def play(history: History, size: Size, rule: Rule, seed: tuple[int, ...], patience: int = 1) -> Played:
    """One copy: judged round after round, until the run stops or the history ends."""
    values, difference, groups = correct_by_round(history.levels, size, np.random.default_rng(seed))
    heldout = Heldout(difference, groups, choosing_half([str(group) for group in groups], 0))
    verdicts: list[str] = []
    past: list[tuple[str, int]] = [("promote", 0)]
    stop, best = None, None
    for number in range(1, len(history.levels)):
        state = run_state(past)
        promoted = {r: values[r] for r in state.promoted}
        judged = compare_round(values[number], promoted, state.lineage, heldout, rule, seed=0)
        decision, head = decide_round(judged, state, round=number, patience=patience, max_rounds=10**9)
        best = judged.best
        verdicts.append(judged.verdict.name)
        past.append((decision.decision, head))
        stop = decision.stop_reason
        if stop is not None:
            break
    assert best is not None
    return Played(tuple(verdicts), tuple(decision for decision, _ in past), stop, best)


@dataclass(frozen=True)
class Row:
    """Shares of the copies, in [0, 1]; None where there is nothing of the kind."""

    stopped_early: float
    """Stopped, for whatever reason, while the truth was still improving."""
    found: float | None
    """`degrading` in time, of the copies that had not stopped before the fall."""
    false_falls: float
    """`degrading` in some round before the fall (or in any, where there is none)."""
    converged: float
    """Stopped as converged."""
    last: dict[str, float]
    """The last verdict, by name."""
    chosen_excess: float
    """Best round's score on the half that chose it less its true level, mean."""
    reported_excess: float
    """The same on the half that reports it."""


def row(history: History, played: list[Played]) -> Row:
    """The table's row of one history at one size."""
    stops = [len(p.verdicts) if p.stop_reason else None for p in played]
    fall = history.falls_at
    end = len(history.levels) if fall is None else fall
    reached = [p for p in played if fall is not None and len(p.verdicts) >= fall]
    found = [
        fall is not None and "degrading" in p.verdicts[fall - 1 : fall - 1 + history.within] for p in reached
    ]
    apart = [
        (p.best.chosen_by - history.levels[p.best.round], p.best.score.value - history.levels[p.best.round])
        for p in played
        if p.best.chosen_by is not None and p.best.score.value is not None
    ]
    names = Counter(p.verdicts[-1] for p in played)
    return Row(
        float(np.mean([stop is not None and stop < history.improves_until for stop in stops])),
        float(np.mean(found)) if found else None,
        float(np.mean(["degrading" in p.verdicts[: end - 1] for p in played])),
        float(np.mean([p.stop_reason == "converged" for p in played])),
        {name: count / len(played) for name, count in names.most_common()},
        *(float(np.mean(column)) for column in zip(*apart, strict=True)),
    )


def table(copies: int, rule: Rule, sizes: Sequence[str]) -> Iterator[tuple[str, str, Row]]:
    """(size, history, row) of all."""
    for name_of_size in sizes:
        size_at, size = list(SIZES).index(name_of_size), SIZES[name_of_size]
        for at, (name, history) in enumerate(HISTORIES.items()):
            played = [play(history, size, rule, (size_at, at, copy)) for copy in range(copies)]
            yield name_of_size, name, row(history, played)


def main(copies: int = 1000, *sizes: int) -> None:
    """Print the table as markdown."""
    rule = replace(Rule(), resamples=1000)
    out = sys.stdout
    heads = [
        "held out", "history", "stopped while improving", "fall found in time", "degrading before it",
        "converged", "last verdict", "best round: chosen − true, reported − true",
    ]  # fmt: skip
    out.write(f"{copies} copies each; {rule}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    wanted = [name for at, name in enumerate(SIZES) if not sizes or at in sizes]
    for size, name, r in table(copies, rule, wanted):
        found = "" if r.found is None else f"{r.found:.3f}"
        last = ", ".join(f"{verdict} {share:.3f}" for verdict, share in r.last.items())
        out.write(
            f"| {size} | {name} | {r.stopped_early:.3f} | {found} | {r.false_falls:.3f} | {r.converged:.3f} "
            f"| {last} | {r.chosen_excess:+.3f}, {r.reported_excess:+.3f} |\n"
        )
        out.flush()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
