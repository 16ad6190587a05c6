"""Arms of one experiment compared on the same held-out pairs, pooled over seeds.

    c̄_i = Σ_s c_is / S      mean over S seeds of how pair i is ranked: 1 correct, ½ a tie, 0 wrong

Accuracy, its values on the sides of a feature, balanced accuracy and reliance (`sera_core.method.sides`) are
sums of c with fixed weights, so their means over seeds are those of c̄. An interval resamples prompts: the
pairs of a prompt under every seed are drawn together, because they are ranked alike. It tells how far the
held-out prompts decide; the seeds stay those that were run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sera_core.method.estimates import Estimate, check_finite
from sera_core.method.sides import SIDES, sides_of

VALUES = ("accuracy", "balanced", "reliance", *SIDES)
"""What is measured of an arm."""
DIFFERENCES = ("balanced", "reliance")
"""What is compared with the first arm."""


@dataclass(frozen=True)
class Difference:
    """An arm less the first arm, on the same held-out pairs."""

    balanced: Estimate
    reliance: Estimate

    @property
    def distinguishable(self) -> bool:
        """Whether an interval lies on one side of 0."""
        return any(is_apart(change) for change in (self.balanced, self.reliance))


def is_apart(change: Estimate) -> bool:
    """Whether the interval of a difference does not hold 0."""
    return change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)


def values_of(
    correct: Float[np.ndarray, "seed pair"], difference: Float[np.ndarray, " pair"]
) -> dict[str, float | None]:
    """Each of VALUES, as its mean over seeds; None where a side it needs has no pair.

    Args:
        correct: how each held-out pair is ranked under each seed's policy, in [0, 1].
        difference: the feature of the chosen answer less that of the rejected one; only its sign counts.

    Raises:
        ValueError: arrays of different pairs, or a value that is no finite number.
    """
    mean = _pooled(correct, difference)
    sides = sides_of([mean], difference, None, seed=0)
    return {name: sides.sample.value(sides.of(name)) for name in VALUES}


def difference_from_first(
    arm: Float[np.ndarray, "seed pair"],
    first: Float[np.ndarray, "seed pair"],
    difference: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Difference:
    """An arm's balanced accuracy and reliance less the first arm's: `changes_from` of DIFFERENCES."""
    changes = changes_from(
        first, arm, difference, groups, DIFFERENCES, seed=seed, resamples=resamples, level=level
    )
    return Difference(**changes)


def changes_from(
    first: Float[np.ndarray, "seed pair"],
    other: Float[np.ndarray, "seed pair"],
    difference: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"],
    quantities: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Each quantity of the other less that of the first, with cluster bootstrap intervals.

    Args:
        first, other: as `correct` of `values_of`, the same pairs in the same order.
        difference: as in `values_of`.
        groups: number of each pair's prompt.
        quantities: some of VALUES.
        seed: of the resamples; the same arrays and seed give the same intervals.

    Raises:
        ValueError: as `values_of`.
    """
    rounds = [_pooled(correct, difference) for correct in (other, first)]
    sides = sides_of(rounds, difference, groups, seed=seed, resamples=resamples)
    return {quantity: sides.change(quantity, 1, level) for quantity in quantities}


def _pooled(
    correct: Float[np.ndarray, "seed pair"], difference: Float[np.ndarray, " pair"]
) -> Float[np.ndarray, " pair"]:
    if not correct.shape[0]:
        raise ValueError("A comparison needs at least one seed.")
    mean = correct.mean(axis=0)
    check_finite({"difference": difference, "correctness": mean})
    return mean
