"""What a judge's verdicts say: who wins, and whether the judge can be believed.

A comparison of two answers is judged in both orders. An *outcome* is that of the first answer: 1 it wins, 0.5
a tie, 0 it loses, whichever place it was shown in.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.win_rates import (
    NO_RATE,
    Groups,
    Rate,
    bootstrap_difference,
    length_controlled_win_rate,
    order_swap_agreement,
    win_rate,
)

SEED = 0
"""Seed of every bootstrap here."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Judged:
    """Comparisons with a verdict in both orders."""

    given: Float[np.ndarray, " comparison"]
    """Outcome with the first answer shown first."""
    swapped: Float[np.ndarray, " comparison"]
    """Outcome with the first answer shown second."""
    length_difference: Float[np.ndarray, " comparison"]
    """Length of the first answer less that of the second, in words."""
    groups: Groups
    """Number of each comparison's prompt; comparisons of one prompt are not independent."""

    def only(self, chosen: Bool[np.ndarray, " comparison"]) -> "Judged":
        """The chosen comparisons."""
        columns = (self.given, self.swapped, self.length_difference, self.groups)
        return Judged(*(column[chosen] for column in columns))

    @property
    def outcomes(self) -> Float[np.ndarray, " comparison"]:
        """The outcome where both orders agree; a tie (0.5) where they differ."""
        return np.where(self.given == self.swapped, self.given, 0.5)


def wins(judged: Judged) -> Rate:
    """Win rate of the first answers, Wilson's interval with prompts as clusters; 0.5 is a draw."""
    return win_rate(judged.outcomes, groups=judged.groups)


def ties(judged: Judged) -> Rate:
    """Share of ties: called so in both orders, or called differently in the two orders."""
    return win_rate((judged.outcomes == 0.5).astype(np.float64), groups=judged.groups)


def wins_at_equal_length(judged: Judged) -> Rate:
    """Win rate if both answers were equally long (AlpacaEval 2, arXiv 2404.04475), lengths in words."""
    return length_controlled_win_rate(
        judged.outcomes, judged.length_difference, seed=SEED, resamples=RESAMPLES, groups=judged.groups
    )


def order_flips(judged: Judged) -> Rate:
    """Share of comparisons whose verdict changes with the order; 1 for a judge that sees only the place."""
    same = order_swap_agreement(judged.given, judged.swapped, groups=judged.groups)
    return Rate(1 - same.value, 1 - same.high, 1 - same.low, same.n, same.groups)


def longer_preferred(judged: Judged) -> Rate:
    """Share of verdicts for the longer answer, in words.

    Of the single verdicts, two a comparison; without ties, and without answers of equal length. A judge that
    does not look at length has 0.5, if longer answers are not better.
    """
    outcomes = np.concatenate([judged.given, judged.swapped])
    difference = np.tile(judged.length_difference, 2)
    told = (outcomes != 0.5) & (difference != 0)
    longer = ((outcomes == 1) == (difference > 0))[told]
    return win_rate(longer.astype(np.float64), groups=np.tile(judged.groups, 2)[told])


def label_kappa(judged: Judged) -> Rate:
    """Cohen's kappa of the judge with the human label, if the first answers are those people preferred.

    Items are the single verdicts, two a comparison. People call the first place better in one order and the
    second in the other, so their labels are balanced; a tie of the judge is a disagreement.
    """
    n = judged.given.size
    human = np.concatenate([np.zeros(n), np.full(n, 2)]).astype(np.int64)
    # By place: 0 the first place is better, 1 a tie, 2 the second place.
    judge = np.concatenate([2 - 2 * judged.given, 2 * judged.swapped]).astype(np.int64)
    return cohens_kappa(human, judge, groups=np.tile(judged.groups, 2), seed=SEED, resamples=RESAMPLES)


def better_than(judged: Judged, other: Judged) -> Rate:
    """Agreement with people less that of another judge on the same pairs: paired bootstrap by prompt."""
    return bootstrap_difference(
        judged.outcomes, other.outcomes, seed=SEED, resamples=RESAMPLES, groups=judged.groups
    )


def cohens_kappa(
    first: Int[np.ndarray, " first"],
    second: Int[np.ndarray, " second"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Groups | None = None,
) -> Rate:
    """Agreement of two raters beyond chance, with its percentile bootstrap interval.

        κ = (p_o − p_e) / (1 − p_e),   p_o = Σ_c p_cc,   p_e = Σ_c p_c· p_·c          Cohen 1960

    Whole groups of items are resampled; draws in which chance explains everything (p_e = 1) are left out.

    Args:
        first: category of each item by one rater, 0 or more.
        second: the same by the other.
        groups: group (prompt) of each item; None: each is independent.

    Raises:
        ValueError: raters of different numbers of items, or a negative category.
    """
    if first.size != second.size:
        raise ValueError(f"{first.size} ratings cannot be compared with {second.size}; align them by item.")
    n = first.size
    if n == 0:
        return NO_RATE
    if min(first.min(), second.min()) < 0:
        raise ValueError("a category is a whole number of 0 or more; leave out items without a rating.")
    kinds = int(max(first.max(), second.max())) + 1
    _, numbers = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    count = int(numbers.max()) + 1
    cells = np.zeros((count, kinds * kinds), dtype=np.int64)
    np.add.at(cells, (numbers, first * kinds + second), 1)
    value = float(_kappa(cells.sum(axis=0, keepdims=True), kinds)[0])
    # Groups with equal tables are interchangeable, so the resamples are multinomial draws of tables.
    tables, times = np.unique(cells, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(count, times / count, size=resamples)
    found = _kappa(drawn @ tables, kinds)
    found = found[np.isfinite(found)]
    if count < 2 or not found.size:
        return Rate(value, float("nan"), float("nan"), n, count)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Rate(value, float(low), float(high), n, count)


def _kappa(cells: Int[np.ndarray, "table cell"], kinds: int) -> Float[np.ndarray, " table"]:
    """κ of each table of counts; nan where p_e = 1."""
    shares = cells.reshape(-1, kinds, kinds) / cells.sum(axis=1)[:, None, None]
    observed = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)
