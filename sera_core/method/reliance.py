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
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.diagnostics import correctness
from sera_core.method.correlation import partial_rank_correlation, rank_correlation
from sera_core.method.estimates import (
    Estimate,
    Quantity,
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


def side_columns(
    correct: Float[np.ndarray, " pair"], difference: Float[np.ndarray, " pair"]
) -> Float[np.ndarray, "pair 6"]:
    """(correct, 1) on the aligned, the counter and the equal side; 0 elsewhere."""
    sides = [difference > 0, difference < 0, difference == 0]
    return np.stack([column for side in sides for column in (correct * side, side)], axis=1).astype(
        np.float64
    )


def of_sides(sums: Float[np.ndarray, "resample 6"], quantity: str) -> Float[np.ndarray, " resample"]:
    """One of QUANTITIES from sums of `side_columns`; nan where a side it needs has no pair."""
    aligned, counter, equal = (ratio(sums[:, k], sums[:, k + 1]) for k in (0, 2, 4))
    if quantity == "accuracy":
        return ratio(sums[:, 0::2].sum(axis=1), sums[:, 1::2].sum(axis=1))
    return {
        "aligned": aligned,
        "counter": counter,
        "equal": equal,
        "reliance": aligned - counter,
        "balanced": (aligned + counter) / 2,
        "worst_side": np.minimum(aligned, counter),
    }[quantity]


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
    how = {"seed": seed, "resamples": resamples, "level": level}
    correct = correctness(margins)
    accuracies = {name: score(correct, difference, name, groups, **how) for name in QUANTITIES}
    varies = difference != 0
    prefers = np.where(difference > 0, correct, 1 - correct) * varies
    return Reliance(
        accuracies,
        _estimated(np.stack([prefers, varies], axis=1).astype(np.float64), _mean, groups, varies, how),
        rank_correlation(difference, margins, groups, **how),
        Estimate(None, None, None, len(margins), prompts_in(groups, np.ones(len(margins), dtype=bool)))
        if length_difference is None
        else partial_rank_correlation(difference, margins, length_difference, groups, **how),
        {side: int(pairs_of(side, difference).sum()) for side in SIDES},
    )


def _mean(sums: Float[np.ndarray, "resample 2"]) -> Float[np.ndarray, " resample"]:
    return ratio(sums[:, 0], sums[:, 1])


def _estimated(columns: np.ndarray, quantity: Quantity, groups, of: np.ndarray, how: dict) -> Estimate:
    return estimate(columns, quantity, groups, pairs=int(of.sum()), prompts=prompts_in(groups, of), **how)


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
    correct = {name: correctness(margins) for name, margins in {"": now, **before}.items()}
    return {
        quantity: changes(
            correct[""],
            {name: correct[name] for name in before},
            difference,
            quantity,
            groups,
            seed=seed,
            resamples=resamples,
            level=level,
        )
        for quantity in QUANTITIES
    }


def changes(
    now: Float[np.ndarray, " pair"],
    before: Mapping[str, Float[np.ndarray, " pair"]],
    difference: Float[np.ndarray, " pair"],
    quantity: str,
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Paired changes of one quantity against other rounds, with simultaneous intervals (max-t bootstrap).

    Args:
        now: correctness (or wins) of each pair in this round, in [0, 1].
        before: likewise of the rounds to compare with, by name.
        difference: d of each pair; only its sign counts.
        quantity: one of QUANTITIES.
        groups: number of each pair's prompt; None: each pair stands for itself.
    """
    columns = np.concatenate([side_columns(values, difference) for values in (now, *before.values())], axis=1)

    def change(sums: Float[np.ndarray, "resample column"], at: int) -> Float[np.ndarray, " resample"]:
        then = sums[:, 6 * at : 6 * (at + 1)]
        return of_sides(sums[:, :6], quantity) - of_sides(then, quantity)

    of = pairs_of(quantity, difference)
    return simultaneous(
        columns,
        {name: partial(change, at=at) for at, name in enumerate(before, start=1)},
        groups,
        pairs=int(of.sum()),
        prompts=prompts_in(groups, of),
        seed=seed,
        resamples=resamples,
        level=level,
    )


def score(
    correct: Float[np.ndarray, " pair"],
    difference: Float[np.ndarray, " pair"],
    quantity: str,
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """One of QUANTITIES with its cluster bootstrap interval.

    Args:
        correct: correctness (or wins) of each pair, in [0, 1].
        difference: d of each pair; only its sign counts.
        groups: number of each pair's prompt; None: each pair stands for itself.
    """
    how = {"seed": seed, "resamples": resamples, "level": level}
    of, columns = pairs_of(quantity, difference), side_columns(correct, difference)
    return _estimated(columns, partial(of_sides, quantity=quantity), groups, of, how)


def trend(
    rounds: Sequence[Float[np.ndarray, " pair"]],
    difference: Float[np.ndarray, " pair"],
    quantity: str,
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.9,
) -> Estimate:
    """Change of a quantity a round: the least-squares slope through rounds, with its cluster bootstrap
    interval.

        Σ_k (k − k̄) q_k / Σ_k (k − k̄)²

    Through three rounds its standard error is half that of the change between two neighbours.

    Args:
        rounds: correctness (or wins) of each pair, one array a round, oldest first; at least two.
        difference: d of each pair; only its sign counts.
        quantity: one of QUANTITIES.
        groups: number of each pair's prompt; None: each pair stands for itself.
    """
    at = np.arange(len(rounds)) - (len(rounds) - 1) / 2
    weights = at / (at**2).sum()

    def slope(sums: Float[np.ndarray, "resample column"]) -> Float[np.ndarray, " resample"]:
        parts = [of_sides(sums[:, 6 * k : 6 * (k + 1)], quantity) for k in range(len(rounds))]
        return np.stack(parts, axis=1) @ weights

    columns = np.concatenate([side_columns(values, difference) for values in rounds], axis=1)
    how = {"seed": seed, "resamples": resamples, "level": level}
    return _estimated(columns, slope, groups, pairs_of(quantity, difference), how)


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
