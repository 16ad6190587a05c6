"""The verdict on a round: compared with every earlier promoted round, so that a slow decline is seen.

A run that compares each round with the last head alone may lose a little in each round without noticing. Here
a round is compared, pair by pair, with all promoted rounds at once, round 0, the best round and the last head
among them. Convergence must be shown, with power: by the trend over several heads. The SeRA paper says that
convergence should be monitored but gives no rule; the rules and thresholds here are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.best import Best, best_of
from sera_core.method.estimates import Estimate, check_finite
from sera_core.method.sides import OF_ALL, design_effect, held_out, sides_of, unit

VERDICTS = ("converged", "improving", "degrading", "still_moving", "not_enough_evidence")
METRICS = ("balanced", "accuracy", "worst-side", "win-rate")
_QUANTITY = {
    "balanced": "balanced",
    "worst-side": "worst_side",
    "accuracy": "accuracy",
    "win-rate": "win_rate",
}


@dataclass(frozen=True)
class Heldout:
    """The held-out pairs (for `win-rate`: the judged prompts), which are the same in every round."""

    difference: Float[np.ndarray, " pair"]
    """The feature of the chosen answer minus that of the rejected one; all 0 if no feature is compared."""
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
    """Smaller drops are tolerated, even if they are certain."""
    min_effect: float = 0.02
    """Smaller changes per round count as none."""
    window: int = 2
    """Number of heads before this round over which the score must not change for convergence."""
    min_prompts: int = 30
    """Smallest number of held-out prompts for a verdict."""
    min_side: int = 10
    """With fewer pairs on a side, accuracy is used instead of `balanced` and `worst-side`."""
    min_overlap: float = 0.8
    """Smallest overlap of the selection with the last head's that counts as unchanged."""
    max_ks: float = 0.1
    """Largest KS distance of the margins to the last head's that counts as unchanged."""
    level: float = 0.90
    """Joint level of the two-sided intervals of all changes: a drop is tested one-sided, at 5 %."""
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
class Verdict:
    """The verdict: one of VERDICTS, the reason in words, and the numbers behind it."""

    converged: bool
    name: str
    reason: str
    evidence: dict


@dataclass(frozen=True)
class Comparison:
    """A round compared with the promoted rounds: the verdict and its evidence."""

    verdict: Verdict
    """Name (of `convergence.VERDICTS`), the reason in one sentence, and the numbers."""
    quantity: str
    """What was compared; accuracy if a side has too few pairs."""
    score: Estimate
    """This round's."""
    against: dict[int, Estimate]
    """Its paired change against each promoted round, with simultaneous intervals."""
    since_first: Estimate
    """Its paired change against the first promoted round, by itself (95 %)."""
    trend: Estimate | None
    """Change per round over the window, with a 90 % interval; None with too few heads."""
    best: Best
    """The best promoted round before this one."""


def compare_round(
    now: Float[np.ndarray, " pair"],
    promoted: Mapping[int, Float[np.ndarray, " pair"]],
    lineage: Sequence[int],
    heldout: Heldout,
    rule: Rule,
    *,
    seed: int,
    overlap: float | None = None,
    ks: float | None = None,
) -> Comparison:
    """Judge a round against all promoted rounds. The first lineage that holds decides.

    | name                  | when                                                                          |
    |-----------------------|-------------------------------------------------------------------------------|
    | `not_enough_evidence` | fewer than `min_prompts` held-out prompts                                     |
    | `degrading`           | against a promoted round: interval below 0, and the drop at least `tolerance` |
    | `improving`           | against the last head: interval above 0; or the trend's is                    |
    | `not_enough_evidence` | fewer heads than `window`, or the trend's interval is not in ±`min_effect`    |
    | `still_moving`        | no trend, but the selection (overlap) or the margins (KS) changed             |
    | `converged`           | no trend, shown with power, and nothing moves                                 |

    Drops: 90 % max-t bootstrap intervals that hold for all promoted rounds together, so choosing the best
    round by its score does no harm. Trend: the slope of a line through the window's heads and this round; it
    is inside ±min_effect by two one-sided tests at 5 % (Schuirmann 1987), by its 90 % interval. No interval
    is narrower than the rule of three allows: an event not seen in n pairs may still have a rate of 3/n.

    Args:
        now: `diagnostics.correctness` of the held-out margins under this round's policy; for `win-rate` its
            wins.
        promoted: likewise under the policy of each promoted round, by number; the same pairs in the same
            order.
        lineage: promoted rounds that this round's policy descends from, oldest first; the last is the head.
        heldout: the pairs that all rounds share.
        rule: the settings.
        seed: of the resamples; the same arrays and seed give the same verdict.
        overlap: Jaccard overlap of the selection with the last head's; None: not measured.
        ks: KS distance of the margins to the last head's; None: not measured.

    Raises:
        ValueError: arrays of different lengths, a value that is not finite, no promoted round, a lineage that
            names a round which was not promoted.
    """
    _check_given(now, promoted, lineage, heldout)
    quantity = quantity_for(heldout.difference, rule)
    least = _least_half_width(now, promoted[lineage[-1]], heldout, quantity)
    how = {"seed": seed, "resamples": rule.resamples}
    place = {number: at for at, number in enumerate(promoted, start=1)}
    rounds = [now, *promoted.values()]
    sides = sides_of(rounds, heldout.difference, heldout.groups, equal=quantity in OF_ALL, **how)
    changes = sides.changes(quantity, {str(number): at for number, at in place.items()}, rule.level)
    against = {number: _widened(changes[str(number)], least) for number in promoted}
    slope = None
    if len(lineage) >= rule.window:
        window = [*(place[number] for number in lineage[-rule.window :]), 0]
        slope = _widened(sides.trend(quantity, window), least)
    found = sides.score(quantity)
    best = best_of(promoted, heldout.difference, heldout.groups, heldout.chooses, quantity, **how)
    since_first = sides.change(quantity, place[min(promoted)])
    judged = Comparison(Verdict(False, "", "", {}), quantity, found, against, since_first, slope, best)
    name, reason = _judge(judged, lineage, rule, overlap, ks)
    evidence = {"overlap": overlap, "ks": ks, "least_half_width": least, "rule": asdict(rule)}
    return replace(judged, verdict=Verdict(name == "converged", name, reason, evidence))


def score_of(
    correct: Float[np.ndarray, " pair"], heldout: Heldout, quantity: str, rule: Rule, *, seed: int
) -> Estimate:
    """A quantity of one round, with its interval.

    Args:
        correct: as `now` of `compare_round`.
        quantity: of `quantity_for`.
    """
    sides = sides_of([correct], heldout.difference, heldout.groups, seed=seed, resamples=rule.resamples)
    return sides.score(quantity)


def score_words(quantity: str, score: Estimate) -> str:
    """A round's score in words."""
    value = "not measurable" if score.value is None else f"{score.value:.3f}"
    return f"{held_out(quantity)} {value}"


def _judge(
    judged: Comparison, lineage: Sequence[int], rule: Rule, overlap: float | None, ks: float | None
) -> tuple[str, str]:
    what, of = _quantity_words(judged.quantity, rule), unit(judged.quantity)
    head = judged.against[lineage[-1]]
    if judged.score.prompts < rule.min_prompts:
        return "not_enough_evidence", (
            f"{what} is measured on held-out {of} of {judged.score.prompts} prompts; a verdict needs "
            f"at least {rule.min_prompts}"
        )
    if fallen := _falls(judged, rule):
        rounds = "; ".join(
            f"{_role(number, judged, lineage)} by {change.in_words(signed=True, of=of)}"
            for number, change in fallen
        )
        return "degrading", f"{what} fell against {rounds}"
    changed = f"{what} changed against the last head by {head.in_words(signed=True, of=of)}"
    slope = judged.trend
    if slope is not None and slope.measurable:
        changed += f"; over {rule.window + 1} rounds by {_ends(slope)} per round"
    if head.low is not None and head.low > 0:
        return "improving", changed
    if slope is None or slope.low is None or slope.high is None:
        few = f"convergence needs {rule.window} heads before the round, and there are {len(lineage)}"
        return "not_enough_evidence", f"{changed}; {few}"
    if slope.low > 0:
        return "improving", changed
    if not (-rule.min_effect <= slope.low and slope.high <= rule.min_effect):
        return "not_enough_evidence", f"{changed}: {_power(slope, rule, of)}"
    if overlap is not None and not overlap >= rule.min_overlap:
        return "still_moving", f"{changed}; but the overlap of the selections is only {overlap:.2f}"
    if ks is not None and not ks <= rule.max_ks:
        return "still_moving", f"{changed}; but the margins moved (KS distance {ks:.2f})"
    return "converged", f"{changed}: less than {rule.min_effect}"


def _falls(judged: Comparison, rule: Rule) -> list[tuple[int, Estimate]]:
    return [
        (number, change)
        for number, change in sorted(judged.against.items())
        if change.high is not None
        and change.value is not None
        and change.high < 0
        and change.value <= -rule.tolerance
    ]


def _power(slope: Estimate, rule: Rule, of: str) -> str:
    """How many pairs, or answers, would rule a change out."""
    assert slope.low is not None and slope.high is not None
    half = (slope.high - slope.low) / 2
    unclear = f"a change of {rule.min_effect} per round cannot be ruled out"
    if half <= rule.min_effect:
        return unclear
    needed = int(np.ceil(slope.pairs * (half / rule.min_effect) ** 2))
    return f"{unclear}; that would take about {needed:,} {of}"


def _role(number: int, judged: Comparison, lineage: Sequence[int]) -> str:
    roles = {judged.best.round: "the best round", lineage[-1]: "the last head"}
    return f"round {number}" + (f" ({roles[number]})" if number in roles and number != 0 else "")


def _ends(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _quantity_words(quantity: str, rule: Rule) -> str:
    replaced = quantity != _QUANTITY[rule.metric]
    return held_out(quantity) + (f" (a side has too few pairs for {rule.metric})" if replaced else "")


def quantity_for(difference: Float[np.ndarray, " pair"], rule: Rule) -> str:
    """The quantity of the rule's metric; accuracy if a side has fewer than min_side pairs."""
    quantity = _QUANTITY[rule.metric]
    if quantity in OF_ALL or min((difference > 0).sum(), (difference < 0).sum()) >= rule.min_side:
        return quantity
    return "accuracy"


def _least_half_width(now: np.ndarray, head: np.ndarray, heldout: Heldout, quantity: str) -> float:
    """Half width that no interval of a change goes below: the rule of three.

    If none of n pairs changed, the rate of changes may still be 3/n (95 %). With two sides these 3 pairs
    change balanced accuracy most if they are on the smaller side. n is divided by the design effect (Kish
    1965), because pairs of one prompt move together.
    """
    effect = design_effect(now - head, heldout.difference, quantity, heldout.groups)
    if quantity in OF_ALL:
        return 3 * effect / max(1, len(now))
    smaller = min((heldout.difference > 0).sum(), (heldout.difference < 0).sum())
    return (1.5 if quantity == "balanced" else 3) * effect / max(1, int(smaller))


def _widened(change: Estimate, least: float) -> Estimate:
    if change.value is None:
        return change
    low, high = (change.value if end is None else end for end in (change.low, change.high))
    return replace(change, low=min(low, change.value - least), high=max(high, change.value + least))


def _check_given(
    now: np.ndarray, promoted: Mapping[int, np.ndarray], lineage: Sequence[int], heldout: Heldout
) -> None:
    given = {f"round {number}": values for number, values in promoted.items()}
    check_finite({"this round": now, "difference": heldout.difference, **given})
    missing = [number for number in lineage if number not in promoted]
    if not lineage or missing:
        raise ValueError(
            f"The lineage {list(lineage)} must name at least one of the promoted rounds {sorted(promoted)}, "
            "and no other."
        )
    if len(heldout.groups) != len(now) or len(heldout.chooses) != len(now):
        raise ValueError(
            f"{len(heldout.groups)} groups and {len(heldout.chooses)} marks of the choosing half do not match"
            f" {len(now)} pairs."
        )
