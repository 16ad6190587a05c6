"""Which round is best, and how good it is: one half of the held-out prompts chooses, the other half reports.

The largest of several noisy accuracies is too large on the pairs that chose it. On pairs that took no part in
the choice it is not.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.estimates import Estimate
from sera_core.method.sides import OF_ALL, QUANTITY_WORDS, sides_of, unit


def choosing_half(prompts: Sequence[str], seed: int) -> Bool[np.ndarray, " pair"]:
    """The pairs that choose; the others report. Half of the prompts, those with the smallest seeded hash.

    Args:
        prompts: key of each held-out pair's prompt group. Give all held-out pairs, also those that a round
            could not score, so that every round is split alike.
        seed: of the split of the data, so that every run on the same data is halved alike.
    """

    def hashed(prompt: str) -> str:
        return hashlib.sha256(f"halves\x1f{seed}\x1f{prompt}".encode()).hexdigest()

    kinds = sorted(set(prompts), key=hashed)
    chosen = set(kinds[: (len(kinds) + 1) // 2])
    return np.array([prompt in chosen for prompt in prompts], dtype=bool)


@dataclass(frozen=True)
class Best:
    """The best promoted round: chosen by one half of the held-out prompts, reported by the other."""

    round: int
    chosen_by: float | None
    """Its score on the half that chose it: too large by the choice."""
    score: Estimate
    """Its score on the other half."""
    gain: Estimate
    """Its paired change against round 0 on the other half; for round 0 itself, 0."""
    quantity: str
    """What was compared."""
    sentence: str


def best_of(
    promoted: Mapping[int, Float[np.ndarray, " pair"]],
    difference: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"] | None,
    chooses: Bool[np.ndarray, " pair"],
    quantity: str,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Best:
    """The promoted round with the largest score on the choosing half, ties to the earlier.

    Args:
        promoted: correctness (or wins) of each held-out pair by the number of the promoted round; the
            smallest number is round 0.
        difference: the feature's difference of each pair; only its sign counts.
        groups: number of each pair's prompt; None: each pair stands for itself.
        chooses: which pairs choose (`choosing_half`).
        quantity: what is compared: `balanced`, `worst_side`, `accuracy` or `win_rate`; accuracy where it is
            not measurable on the choosing half.

    Raises:
        ValueError: no round.
    """
    if not promoted:
        raise ValueError("No round was promoted, so none is best; round 0 always is.")
    first = min(promoted)
    if quantity not in OF_ALL and _score(promoted[first], difference, chooses, quantity) is None:
        quantity = "accuracy"
    scores = {number: _score(values, difference, chooses, quantity) for number, values in promoted.items()}
    best = max(sorted(scores), key=lambda number: _or_least(scores[number]))
    rest = ~chooses
    part = None if groups is None else groups[rest]
    rounds = [promoted[best][rest], promoted[first][rest]]
    sides = sides_of(rounds, difference[rest], part, seed=seed, resamples=resamples)
    found = sides.score(quantity, level=level)
    gain = sides.changes(quantity, {"round 0": 1}, level)["round 0"]
    return Best(best, scores[best], found, gain, quantity, _sentence(best, first, found, gain, quantity))


def _score(values: np.ndarray, difference: np.ndarray, of: np.ndarray, quantity: str) -> float | None:
    sides = sides_of([values[of]], difference[of], None, seed=0)
    value = sides.sample.value(sides.of(quantity))
    return None if value is None else round(value, 12)  # ties are ties whatever the order of the sums


def _or_least(value: float | None) -> float:
    return float("-inf") if value is None else value


def _sentence(best: int, first: int, found: Estimate, gain: Estimate, quantity: str) -> str:
    by = f"round {best} is best by {QUANTITY_WORDS[quantity]} on half of the held-out prompts"
    of = unit(quantity)
    against = "" if best == first else f", against round {first} {gain.in_words(signed=True, of=of)}"
    return f"{by}; on the other half it has {found.in_words(of=of)}{against}"
