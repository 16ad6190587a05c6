"""Correctness on the sides of a feature, of one round or of several that are compared pair by pair.

    aligned: d > 0, the feature points at the better answer;   counter: d < 0;   equal: d = 0

with d = feature(chosen) − feature(rejected).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.estimates import (
    Estimate,
    Quantity,
    Resampled,
    estimate,
    prompt_sums,
    prompts_in,
    ratio,
    simultaneous,
)

SIDES = ("aligned", "counter", "equal")
QUANTITIES = (*SIDES, "reliance", "balanced", "worst_side", "accuracy")
OF_ALL = ("accuracy", "win_rate")
"""Means over all pairs; the win rate is of answers that a judge compared, which have no sides."""
_OF = {"aligned": (1,), "counter": (-1,), "equal": (0,), **dict.fromkeys(OF_ALL, (-1, 0, 1))}
"""Signs of d that a quantity is of; those that are not here need both 1 and −1."""
QUANTITY_WORDS = {
    "balanced": "balanced accuracy",
    "worst_side": "worst-side accuracy",
    "accuracy": "accuracy",
    "win_rate": "win rate over the start policy",
}


def unit(quantity: str) -> str:
    """What a quantity is a mean over."""
    return "answers" if quantity == "win_rate" else "pairs"


def held_out(quantity: str) -> str:
    """A held-out quantity in words."""
    return f"held-out {QUANTITY_WORDS[quantity]}"


@dataclass(frozen=True)
class Sides:
    """Rounds' correctness on the sides of a feature, resampled together."""

    sample: Resampled
    """Columns: number of pairs on each side, then for each round the sum of correctness on each side."""
    difference: Float[np.ndarray, " pair"]
    names: tuple[str, ...]
    """The sides there are: SIDES, or the first two."""

    def of(self, quantity: str, at: int = 0) -> Quantity:
        """One of QUANTITIES, or the win rate, of a round (by place), from sums; nan where it has no pair."""
        return partial(self._value, quantity, at)

    def _value(
        self, quantity: str, at: int, sums: Float[np.ndarray, "resample column"]
    ) -> Float[np.ndarray, " resample"]:
        k = len(self.names)
        counts, hits = sums[:, :k], sums[:, k * (at + 1) : k * (at + 2)]
        if quantity in OF_ALL:
            return ratio(hits.sum(axis=1), counts.sum(axis=1))
        if quantity in SIDES:
            side = self.names.index(quantity)
            return ratio(hits[:, side], counts[:, side])
        aligned, counter = (ratio(hits[:, side], counts[:, side]) for side in (0, 1))
        if quantity == "reliance":
            return aligned - counter
        return (aligned + counter) / 2 if quantity == "balanced" else np.minimum(aligned, counter)

    def score(self, quantity: str, at: int = 0, level: float = 0.95) -> Estimate:
        """One of QUANTITIES of a round, with its interval."""
        return estimate(self.sample, self.of(quantity, at), **self._counts(quantity), level=level)

    def changes(self, quantity: str, against: Mapping[str, int], level: float = 0.95) -> dict[str, Estimate]:
        """Paired changes of the first round against others (by place), with simultaneous intervals."""
        now = self.of(quantity)
        parts = {name: _less(now, self.of(quantity, at)) for name, at in against.items()}
        return simultaneous(self.sample, parts, **self._counts(quantity), level=level)

    def change(self, quantity: str, at: int, level: float = 0.95) -> Estimate:
        """Paired change of the first round against another (by place), by itself."""
        part = _less(self.of(quantity), self.of(quantity, at))
        return estimate(self.sample, part, **self._counts(quantity), level=level)

    def trend(self, quantity: str, places: Sequence[int], level: float = 0.9) -> Estimate:
        """Change of a quantity a round: the least-squares slope through rounds, by place, oldest first.

            Σ_k (k − k̄) q_k / Σ_k (k − k̄)²

        Through three rounds its standard error is half that of the change between two neighbours.
        """
        at = np.arange(len(places)) - (len(places) - 1) / 2
        weights = at / (at**2).sum()
        parts = [self.of(quantity, place) for place in places]
        return estimate(
            self.sample,
            lambda sums: np.stack([part(sums) for part in parts], axis=1) @ weights,
            **self._counts(quantity),
            level=level,
        )

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
        equal: whether the equal side is asked about (means over all need it).
    """
    masks = [difference > 0, difference < 0, difference == 0][: 3 if equal else 2]
    columns = [*masks, *(values * mask for values in rounds for mask in masks)]
    sample = Resampled(np.stack(columns, axis=1).astype(np.float64), groups, seed, resamples)
    return Sides(sample, difference, SIDES[: len(masks)])


def pairs_of(quantity: str, difference: Float[np.ndarray, " pair"]) -> Bool[np.ndarray, " pair"]:
    """The pairs that a quantity is of."""
    return np.isin(np.sign(difference), _OF.get(quantity, (-1, 1)))


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
    sides = [pairs_of("accuracy", difference)] if quantity in OF_ALL else [difference > 0, difference < 0]
    for side in sides:
        if side.any():
            part[side] = (change[side] - change[side].mean()) / side.sum()
    most = len(change) / len(np.unique(groups))
    apart = float((part**2).sum())
    if apart < 1e-18:
        return most
    return float(np.clip((prompt_sums(part[:, None], groups) ** 2).sum() / apart, 1.0, most))
