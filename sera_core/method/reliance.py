"""Does the policy rank by a feature, such as length, instead of by what is better?

    d = feature(chosen) − feature(rejected),   correct = 1 where the margin is above 0, ½ at a tie

    aligned  = accuracy where d > 0: the feature points at the better answer
    counter  = accuracy where d < 0: it points at the worse one
    reliance = aligned − counter,   balanced = (aligned + counter) / 2,   worst side = the smaller of the two

A policy that goes by the feature alone has reliance 1 and balanced accuracy ½, whatever the share of pairs
with d > 0. Accuracy over all pairs hangs on that share, so it rewards a feature that the labels favour.
Balanced and worst-side accuracy are those of group robustness (Sagawa et al., arXiv 1911.08731), with the
feature's direction as the group; reliance is ours. Margins are in nats, without β.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.diagnostics import correctness
from sera_core.method.correlation import partial_rank_correlation, rank_correlation
from sera_core.method.estimates import (
    Estimate,
    Quantity,
    Resampled,
    check_finite,
    estimate,
    prompt_sums,
    prompts_in,
    ratio,
    simultaneous,
)

SIDES = ("aligned", "counter", "equal")
QUANTITIES = (*SIDES, "reliance", "balanced", "worst_side", "accuracy")
_OF = {"aligned": (1,), "counter": (-1,), "equal": (0,), "accuracy": (-1, 0, 1)}
"""Signs of d that a quantity is of; those that are not here need both 1 and −1."""


@dataclass(frozen=True)
class Reliance:
    """How a policy's ranking of held-out pairs hangs on one feature."""

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


@dataclass(frozen=True)
class Sides:
    """Rounds' correctness on the sides of a feature, resampled together."""

    sample: Resampled
    """Columns: number of pairs on each side, then for each round the sum of correctness on each side."""
    difference: Float[np.ndarray, " pair"]
    names: tuple[str, ...]
    """The sides there are: SIDES, or the first two."""

    def of(self, quantity: str, at: int = 0) -> Quantity:
        """One of QUANTITIES of a round (by place), from sums; nan where a side it needs has no pair."""

        def value(sums: Float[np.ndarray, "resample column"]) -> Float[np.ndarray, " resample"]:
            k = len(self.names)
            counts, hits = sums[:, :k], sums[:, k * (at + 1) : k * (at + 2)]
            if quantity == "accuracy":
                return ratio(hits.sum(axis=1), counts.sum(axis=1))
            if quantity in SIDES:
                side = self.names.index(quantity)
                return ratio(hits[:, side], counts[:, side])
            aligned, counter = (ratio(hits[:, side], counts[:, side]) for side in (0, 1))
            if quantity == "reliance":
                return aligned - counter
            return (aligned + counter) / 2 if quantity == "balanced" else np.minimum(aligned, counter)

        return value

    def score(self, quantity: str, at: int = 0, level: float = 0.95) -> Estimate:
        """One of QUANTITIES of a round, with its interval."""
        return estimate(self.sample, self.of(quantity, at), **self._counts(quantity), level=level)

    def changes(self, quantity: str, against: Mapping[str, int], level: float = 0.95) -> dict[str, Estimate]:
        """Paired changes of round 0 (by place) against others, by name, with simultaneous intervals."""
        now = self.of(quantity)
        parts = {name: _less(now, self.of(quantity, at)) for name, at in against.items()}
        return simultaneous(self.sample, parts, **self._counts(quantity), level=level)

    def trend(self, quantity: str, places: Sequence[int], level: float = 0.9) -> Estimate:
        """Change of a quantity a round: the least-squares slope through rounds, by place, oldest first.

            Σ_k (k − k̄) q_k / Σ_k (k − k̄)²

        Through three rounds its standard error is half that of the change between two neighbours.
        """
        at = np.arange(len(places)) - (len(places) - 1) / 2
        weights = at / (at**2).sum()
        parts = [self.of(quantity, place) for place in places]

        def slope(sums: Float[np.ndarray, "resample column"]) -> Float[np.ndarray, " resample"]:
            return np.stack([part(sums) for part in parts], axis=1) @ weights

        return estimate(self.sample, slope, **self._counts(quantity), level=level)

    def _counts(self, quantity: str) -> dict[str, int]:
        of = pairs_of(quantity, self.difference)
        return {"pairs": int(of.sum()), "prompts": prompts_in(self.sample.groups, of)}


def _less(now: Quantity, then: Quantity) -> Quantity:
    return lambda sums: now(sums) - then(sums)


def sides_of(
    rounds: Sequence[Float[np.ndarray, " pair"]],
    difference: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"] | None,
    *,
    seed: int,
    resamples: int = 2000,
    equal: bool = True,
) -> Sides:
    """Rounds' correctness (or wins) on the sides of a feature.

    Args:
        rounds: correctness of each pair, one array a round, in [0, 1].
        difference: d of each pair; only its sign counts.
        groups: number of each pair's prompt; None: each pair stands for itself.
        seed: of the resamples.
        equal: whether the equal side is asked about (accuracy needs it).
    """
    masks = [difference > 0, difference < 0, difference == 0][: 3 if equal else 2]
    columns = [*masks, *(values * mask for values in rounds for mask in masks)]
    sample = Resampled(np.stack(columns, axis=1).astype(np.float64), groups, seed, resamples)
    return Sides(sample, difference, SIDES[: len(masks)])


def pairs_of(quantity: str, difference: Float[np.ndarray, " pair"]) -> Bool[np.ndarray, " pair"]:
    """The pairs that a quantity is of."""
    return np.isin(np.sign(difference), _OF.get(quantity, (-1, 1)))


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
    """How the ranking of held-out human pairs hangs on a feature, with cluster bootstrap intervals.

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


def design_effect(
    change: Float[np.ndarray, " pair"],
    difference: Float[np.ndarray, " pair"],
    quantity: str,
    groups: Int[np.ndarray, " pair"] | None,
) -> float:
    """How many times fewer independent pairs there are because pairs of one prompt move together (Kish 1965).

        Σ_prompts (Σ_pairs ψ)² / Σ_pairs ψ²,   ψ a pair's part in the change, centred on its side

    In [1, pairs a prompt]; where nothing varies, pairs a prompt: then nothing says that they are independent.
    """
    if groups is None or not change.size:
        return 1.0
    part = np.zeros(len(change))
    sides = [pairs_of("accuracy", difference)] if quantity == "accuracy" else [difference > 0, difference < 0]
    for side in sides:
        if side.any():
            part[side] = (change[side] - change[side].mean()) / side.sum()
    most = len(change) / len(np.unique(groups))
    apart = float((part**2).sum())
    if apart < 1e-18:
        return most
    return float(np.clip((prompt_sums(part[:, None], groups) ** 2).sum() / apart, 1.0, most))
