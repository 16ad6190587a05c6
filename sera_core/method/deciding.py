"""What becomes of a round: judged against every earlier promoted round, so that it cannot drift.

Compared with the last head alone, a run may lose a little each round and never see it. Here a round is
compared, pair by pair, with all promoted rounds at once: round 0, the best round and the last head are among
them. Standing still is shown, not assumed: by the trend over several heads, with power. SeRA's authors ask
for convergence to be monitored and publish no rule; this one and its thresholds are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.best import Best, best_of
from sera_core.method.convergence import Verdict
from sera_core.method.estimates import Estimate, check_finite
from sera_core.method.sides import design_effect, sides_of

METRICS = ("balanced", "accuracy", "worst-side", "win-rate")
_QUANTITY = {
    "balanced": "balanced",
    "worst-side": "worst_side",
    "accuracy": "accuracy",
    "win-rate": "accuracy",
}


@dataclass(frozen=True)
class Heldout:
    """The held-out pairs (for `win-rate`: the judged prompts), which are the same in every round."""

    difference: Float[np.ndarray, " pair"]
    """The feature of the chosen answer less that of the rejected one; 0 for all where none is asked about."""
    groups: Int[np.ndarray, " pair"]
    """Number of each pair's prompt."""
    chooses: Bool[np.ndarray, " pair"]
    """The pairs that choose the best round (`best.choosing_half`); the others report it."""


@dataclass(frozen=True)
class Rule:
    """The decision's settings."""

    metric: str = "balanced"
    """One of METRICS. `win-rate` takes wins (1, ½, 0) over one opponent that is the same for all rounds."""
    tolerance: float = 0.02
    """A fall smaller than this does not matter, however sure it is."""
    min_effect: float = 0.02
    """A change a round smaller than this is no progress."""
    window: int = 2
    """Heads before this round over which it must stand still to have converged."""
    min_prompts: int = 30
    """Fewer held-out prompts give no verdict."""
    min_side: int = 10
    """With fewer pairs on a side, `balanced` and `worst-side` give way to accuracy."""
    min_overlap: float = 0.8
    """Overlap of the selection with the last head's, from which on it counts as the same."""
    max_ks: float = 0.1
    """KS distance of the margins to the last head's, up to which they count as the same."""
    level: float = 0.95
    """Level of the intervals of all falls together."""
    resamples: int = 2000
    """Resamples of every interval."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"The metric {self.metric!r} is unknown; choose one of {', '.join(METRICS)}.")
        if min(self.min_effect, self.window, self.min_side) <= 0 or self.tolerance < 0:
            raise ValueError(
                f"min_effect = {self.min_effect}, window = {self.window} and min_side = {self.min_side} must "
                f"be positive, and tolerance = {self.tolerance} not negative."
            )


@dataclass(frozen=True)
class Judged:
    """A round's verdict with what it rests on."""

    verdict: Verdict
    """Name (of `convergence.VERDICTS`), the reason in one sentence, and the numbers."""
    quantity: str
    """What was compared; accuracy where a side has too few pairs."""
    score: Estimate
    """This round's."""
    against: dict[int, Estimate]
    """Its paired change against each promoted round, with simultaneous intervals."""
    trend: Estimate | None
    """Change a round over the window, with a 90 % interval; None with too few heads."""
    best: Best
    """The best promoted round before this one."""


def judge_round(
    now: Float[np.ndarray, " pair"],
    promoted: Mapping[int, Float[np.ndarray, " pair"]],
    line: Sequence[int],
    heldout: Heldout,
    rule: Rule,
    *,
    seed: int,
    overlap: float | None = None,
    ks: float | None = None,
) -> Judged:
    """Judge a round against all promoted rounds. The first line that holds decides.

    | name                  | when                                                                          |
    |-----------------------|-------------------------------------------------------------------------------|
    | `not_enough_evidence` | fewer than `min_prompts` held-out prompts                                     |
    | `degrading`           | against a promoted round: interval below 0, and the fall at least `tolerance` |
    | `improving`           | against the last head: interval above 0; or the trend's is                    |
    | `not_enough_evidence` | fewer heads than `window`, or the trend's interval is not in ±`min_effect`    |
    | `still_moving`        | no trend, but the selection (overlap) or the margins (KS) changed             |
    | `converged`           | no trend, shown with power, and nothing moves                                 |

    Falls: max-t bootstrap intervals that hold for all promoted rounds together, so it does not matter that
    the best of them was chosen by its accuracy. Trend: the slope of a line through the window's heads and
    this round, in ±min_effect by two one-sided tests at 5 % (Schuirmann 1987), that is by its 90 % interval.
    An interval is never taken narrower than the rule of three allows: what did not happen in n pairs may
    still happen to 3 in n.

    Args:
        now: `diagnostics.correctness` of the held-out margins under this round's policy; for `win-rate` its
            wins.
        promoted: likewise under the policy of each promoted round, by number; the same pairs in the same
            order.
        line: promoted rounds that this round's policy descends from, oldest first; the last is the head.
        heldout: what the rounds have in common.
        rule: the settings.
        seed: of the resamples; the same arrays and seed give the same verdict.
        overlap: Jaccard overlap of the selection with the last head's; None: not asked about.
        ks: KS distance of the margins to the last head's; None: not asked about.

    Raises:
        ValueError: arrays of different lengths, a value that is no finite number, no promoted round, a line
            that names a round which was not promoted.
    """
    _check_given(now, promoted, line, heldout)
    quantity = _in_force(heldout.difference, rule)
    least = _least_half_width(now, promoted[line[-1]], heldout, quantity)
    how = {"seed": seed, "resamples": rule.resamples}
    place = {number: at for at, number in enumerate(promoted, start=1)}
    rounds = [now, *promoted.values()]
    sides = sides_of(rounds, heldout.difference, heldout.groups, equal=quantity == "accuracy", **how)
    changes = sides.changes(quantity, {str(number): at for number, at in place.items()}, rule.level)
    against = {number: _widened(changes[str(number)], least) for number in promoted}
    slope = None
    if len(line) >= rule.window:
        window = [*(place[number] for number in line[-rule.window :]), 0]
        slope = _widened(sides.trend(quantity, window), least)
    found = sides.score(quantity, level=rule.level)
    best = best_of(
        promoted, heldout.difference, heldout.groups, heldout.chooses, quantity, level=rule.level, **how
    )
    judged = Judged(Verdict(False, "", "", {}), quantity, found, against, slope, best)
    name, reason = _judge(judged, line, rule, overlap, ks)
    evidence = {"overlap": overlap, "ks": ks, "least_half_width": least, "rule": asdict(rule)}
    return replace(judged, verdict=Verdict(name == "converged", name, reason, evidence))


def _judge(
    judged: Judged, line: Sequence[int], rule: Rule, overlap: float | None, ks: float | None
) -> tuple[str, str]:
    what = _said_quantity(judged.quantity, rule)
    head = judged.against[line[-1]]
    if judged.score.prompts < rule.min_prompts:
        return "not_enough_evidence", (
            f"held-out pairs of {judged.score.prompts} prompts say nothing of {what}: at least "
            f"{rule.min_prompts} are asked for"
        )
    if fallen := _falls(judged, rule):
        said = "; ".join(f"{_role(number, judged, line)} by {change.said(True)}" for number, change in fallen)
        return "degrading", f"{what} fell against {said}"
    changed = f"{what} changed against the last head by {head.said(True)}"
    slope = judged.trend
    if slope is not None and slope.measurable:
        changed += f"; over {rule.window + 1} rounds by {_ends(slope)} a round"
    if head.low is not None and head.low > 0:
        return "improving", changed
    if slope is None or slope.low is None or slope.high is None:
        few = f"standing still is judged over {rule.window} heads before a round, and there are {len(line)}"
        return "not_enough_evidence", f"{changed}; {few}"
    if slope.low > 0:
        return "improving", changed
    if not (-rule.min_effect <= slope.low and slope.high <= rule.min_effect):
        return "not_enough_evidence", f"{changed}: {_power(slope, rule)}"
    if overlap is not None and not overlap >= rule.min_overlap:
        return "still_moving", f"{changed}; but the selection overlaps by {overlap:.2f} only"
    if ks is not None and not ks <= rule.max_ks:
        return "still_moving", f"{changed}; but the margins moved by a KS distance of {ks:.2f}"
    return "converged", f"{changed}: less than {rule.min_effect}"


def _falls(judged: Judged, rule: Rule) -> list[tuple[int, Estimate]]:
    return [
        (number, change)
        for number, change in sorted(judged.against.items())
        if change.high is not None
        and change.value is not None
        and change.high < 0
        and change.value <= -rule.tolerance
    ]


def _power(slope: Estimate, rule: Rule) -> str:
    """What would be needed to rule a change out."""
    assert slope.low is not None and slope.high is not None
    half = (slope.high - slope.low) / 2
    said = f"a change of {rule.min_effect} a round could not be ruled out"
    if half <= rule.min_effect:
        return said
    needed = int(np.ceil(slope.pairs * (half / rule.min_effect) ** 2))
    return f"{said}; that would take about {needed:,} pairs"


def _role(number: int, judged: Judged, line: Sequence[int]) -> str:
    roles = {judged.best.round: "the best round", line[-1]: "the last head"}
    return f"round {number}" + (f" ({roles[number]})" if number in roles and number != 0 else "")


def _ends(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _said_quantity(quantity: str, rule: Rule) -> str:
    if rule.metric == "win-rate":
        return "the win rate"
    said = {"balanced": "balanced accuracy", "worst_side": "worst-side accuracy", "accuracy": "accuracy"}[
        quantity
    ]
    gave_way = quantity != _QUANTITY[rule.metric]
    return f"held-out {said}" + (f" (a side has too few pairs for {rule.metric})" if gave_way else "")


def _in_force(difference: np.ndarray, rule: Rule) -> str:
    quantity = _QUANTITY[rule.metric]
    if quantity == "accuracy" or min((difference > 0).sum(), (difference < 0).sum()) >= rule.min_side:
        return quantity
    return "accuracy"


def _least_half_width(now: np.ndarray, head: np.ndarray, heldout: Heldout, quantity: str) -> float:
    """Half width that no interval of a change goes below: the rule of three.

    Where none of n pairs changed, up to 3 in n may still (95 %). On two sides the pairs that may still change
    are 3 in all, and balanced accuracy moves most when they are on the smaller side. n is divided by the
    design effect (Kish 1965), since pairs of one prompt move together.
    """
    effect = design_effect(now - head, heldout.difference, quantity, heldout.groups)
    if quantity == "accuracy":
        return 3 * effect / max(1, len(now))
    smaller = min((heldout.difference > 0).sum(), (heldout.difference < 0).sum())
    return (1.5 if quantity == "balanced" else 3) * effect / max(1, int(smaller))


def _widened(change: Estimate, least: float) -> Estimate:
    if change.value is None:
        return change
    low, high = (change.value if end is None else end for end in (change.low, change.high))
    return replace(change, low=min(low, change.value - least), high=max(high, change.value + least))


def _check_given(
    now: np.ndarray, promoted: Mapping[int, np.ndarray], line: Sequence[int], heldout: Heldout
) -> None:
    given = {f"round {number}": values for number, values in promoted.items()}
    check_finite({"this round": now, "difference": heldout.difference, **given})
    missing = [number for number in line if number not in promoted]
    if not line or missing:
        raise ValueError(
            f"The line of heads {list(line)} must name promoted rounds, at least one, of {sorted(promoted)}."
        )
    if len(heldout.groups) != len(now) or len(heldout.chooses) != len(now):
        raise ValueError(
            f"{len(heldout.groups)} groups and {len(heldout.chooses)} marks of the choosing half do not fit "
            f"{len(now)} pairs."
        )
