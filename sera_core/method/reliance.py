"""Does the policy rank by a feature, such as length, instead of by what is better?

    d = feature(chosen) − feature(rejected),   correct = 1 where the margin is above 0, ½ at a tie

    aligned  = accuracy where d > 0: the feature points at the better answer
    counter  = accuracy where d < 0: it points at the worse one
    reliance = aligned − counter,   balanced = (aligned + counter) / 2,   worst side = the smaller of the two

A policy that goes by the feature alone has reliance 1 and balanced accuracy ½, whatever the share of pairs
with d > 0. Accuracy over all pairs depends on that share, so it rewards a feature that the labels favour.
Balanced and worst-side accuracy are those of group robustness (Sagawa et al., arXiv 1911.08731), with the
feature's direction as the group; reliance is ours. Margins are in nats, without β.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sera_core.method.correlation import partial_rank_correlation, rank_correlation
from sera_core.method.diagnostics import correctness
from sera_core.method.estimates import Estimate, Resampled, check_finite, estimate, prompts_in, ratio
from sera_core.method.sides import QUANTITIES, SIDES, pairs_of, sides_of


@dataclass(frozen=True)
class Reliance:
    """How a policy's ranking of held-out pairs depends on one feature."""

    accuracies: dict[str, Estimate]
    """Each of QUANTITIES."""
    preferred_more: Estimate
    """Share of pairs with d ≠ 0 in which the policy prefers the answer with more of the feature; ½: not used
    where the better answers have it as often as not."""
    correlation: Estimate
    """Spearman's rank correlation of d and the margin."""
    after_length: Estimate
    """The same after length: the partial correlation, given the difference in length."""
    counts: dict[str, int]
    """Pairs on each of SIDES."""


def reliance(
    difference: Float[np.ndarray, " pair"],
    margins: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    length_difference: Float[np.ndarray, " pair"] | None = None,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Reliance:
    """How the ranking of held-out human pairs depends on a feature, with cluster bootstrap intervals.

    Args:
        difference: d, the feature of the chosen answer less that of the rejected one, in its unit.
        margins: of the same pairs in the same order, in nats.
        groups: number of each pair's prompt; None: each pair stands for itself.
        length_difference: length of the chosen answer less that of the rejected one; None: `after_length` is
            not measured.
        seed: of the resamples; the same arrays and seed give the same intervals.

    What a side without pairs or a constant feature leaves open is not measurable (None), with its counts.

    Raises:
        ValueError: arrays of different lengths, or a value that is no finite number.
    """
    given = {} if length_difference is None else {"length_difference": length_difference}
    check_finite({"difference": difference, "margins": margins, **given})
    correct = correctness(margins)
    sides = sides_of([correct], difference, groups, seed=seed, resamples=resamples)
    varies = difference != 0
    prefers = np.where(difference > 0, correct, 1 - correct) * varies
    preferring = Resampled(np.stack([prefers, varies], axis=1).astype(np.float64), groups, seed, resamples)
    how = {"seed": seed, "resamples": resamples, "level": level}
    everything = {"pairs": len(margins), "prompts": prompts_in(groups, np.ones(len(margins), dtype=bool))}
    return Reliance(
        {name: sides.score(name, level=level) for name in QUANTITIES},
        estimate(preferring, _mean, pairs=int(varies.sum()), prompts=prompts_in(groups, varies), level=level),
        rank_correlation(difference, margins, groups, **how),
        Estimate(None, None, None, **everything)
        if length_difference is None
        else partial_rank_correlation(difference, margins, length_difference, groups, **how),
        {side: int(pairs_of(side, difference).sum()) for side in SIDES},
    )


def _mean(sums: Float[np.ndarray, "resample 2"]) -> Float[np.ndarray, " resample"]:
    return ratio(sums[:, 0], sums[:, 1])


def reliance_changes(
    difference: Float[np.ndarray, " pair"],
    now: Float[np.ndarray, " pair"],
    before: Mapping[str, Float[np.ndarray, " pair"]],
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, dict[str, Estimate]]:
    """Paired changes of each of QUANTITIES against other rounds: quantity → round's name → now − then.

    The intervals of one quantity hold together for all the rounds compared with (max-t bootstrap); different
    quantities are not corrected for each other.

    Args:
        difference: d of each held-out pair.
        now: margins of this round, in nats.
        before: margins of the rounds to compare with, by name (`round 0`, `the last head`, `the best round`):
            the same pairs in the same order.
        groups: number of each pair's prompt; None: each pair stands for itself.

    Raises:
        ValueError: arrays of different lengths, or a value that is no finite number.
    """
    check_finite({"difference": difference, "this round": now, **before})
    rounds = [correctness(margins) for margins in (now, *before.values())]
    sides = sides_of(rounds, difference, groups, seed=seed, resamples=resamples)
    places = {name: at for at, name in enumerate(before, start=1)}
    return {quantity: sides.changes(quantity, places, level) for quantity in QUANTITIES}
