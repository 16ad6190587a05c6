"""Diagnostics of a round: drift, diversity, length, and features that the selection amplifies."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.win_rates import NO_RATE, Rate, bootstrap_difference, bootstrap_excess, win_rate

MIN_PAIRS_A_SIDE = 30  # ours: with fewer pairs, bootstrap intervals of a share are too narrow


def correctness(margins: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """1 where the policy ranks the chosen response first (margin > 0), 0.5 at an exact tie, 0 otherwise.

    Raises:
        ValueError: a margin is nan.
    """
    missing = np.flatnonzero(np.isnan(margins))
    if missing.size:
        raise ValueError(
            f"{missing.size} margins are nan (first: row {missing[0]}), so their order is unknown; "
            "drop these pairs with the reason non_finite."
        )
    return (1 + np.sign(margins)) / 2


def correctness_of_all(margins: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """`correctness`, in which a pair without a finite margin counts as ranked wrongly."""
    return np.where(np.isfinite(margins), correctness(np.nan_to_num(margins)), 0.0)


def reward_accuracy(margins: Float[np.ndarray, " pair"]) -> float:
    """Share of pairs whose chosen response has the larger reward; a tie counts as 0.5. nan without pairs.

    TRL's `rewards/accuracies` counts a tie as wrong. At the start, where every margin is 0, this one is 0.5.
    """
    return float(correctness(margins).mean()) if margins.size else float("nan")


def quantiles(
    values: Float[np.ndarray, " value"], shares: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
) -> Float[np.ndarray, " share"]:
    """Quantiles of the values, linearly interpolated, in the values' unit; nan without values."""
    return np.quantile(values, shares) if values.size else np.full(len(shares), np.nan)


def ks_distance(a: Float[np.ndarray, " a"], b: Float[np.ndarray, " b"]) -> float:
    """Kolmogorov–Smirnov distance sup |F_a − F_b| of two samples, in [0, 1].

    Raises:
        ValueError: a sample is empty.
    """
    if not a.size or not b.size:
        raise ValueError(
            f"Two samples of {a.size} and {b.size} values have no distance; both must have some."
        )
    at = np.concatenate([a, b])
    below_a = np.searchsorted(np.sort(a), at, side="right") / a.size
    below_b = np.searchsorted(np.sort(b), at, side="right") / b.size
    return float(np.abs(below_a - below_b).max())


def sign_changes(previous: Float[np.ndarray, " pair"], current: Float[np.ndarray, " pair"]) -> float:
    """Share of pairs whose margin changed sign since the last round; a change to or from 0 counts too."""
    return float((np.sign(previous) != np.sign(current)).mean()) if previous.size else float("nan")


def jaccard(a: Iterable[str], b: Iterable[str]) -> float:
    """Overlap |A ∩ B| / |A ∪ B| of two sets of ids, in [0, 1]; two empty sets overlap fully."""
    first, second = set(a), set(b)
    union = first | second
    return len(first & second) / len(union) if union else 1.0


@dataclass(frozen=True)
class KL:
    """KL(π ‖ π_ref) per sequence, in nats, estimated on samples of π."""

    plain: float
    """mean(d): unbiased, may be negative."""
    non_negative: float
    """mean(e^(−d) − 1 + d): unbiased, never negative, heavy-tailed if the policies are far apart."""
    n: int


def kl_estimate(
    policy_logps: Float[np.ndarray, " response"], ref_logps: Float[np.ndarray, " response"]
) -> KL:
    """Two Monte Carlo estimates of KL(π ‖ π_ref), from responses drawn from π.

        d = log π(y|x) − log π_ref(y|x),   k1 = mean(d),   k3 = mean(e^(−d) − 1 + d)

    k3 as in J. Schulman, "Approximating KL divergence" (2020). Log-probabilities are summed, in nats. Without
    responses both are nan.
    """
    if not policy_logps.size:
        return KL(float("nan"), float("nan"), 0)
    d = policy_logps - ref_logps
    with np.errstate(over="ignore"):  # infinite for a response that is extremely unlikely under the policy
        k3 = np.expm1(-d) + d
    return KL(float(d.mean()), float(k3.mean()), d.size)


def distinct_n(responses: Sequence[Iterable[int | np.integer]], n: int) -> float:
    """Distinct n-grams of token ids over all n-grams of all responses (distinct-n, arXiv 1510.03055).

    In (0, 1]; lower is more repetitive. nan where no response has n tokens. It falls with the amount of text,
    so compare equal amounts.

    Raises:
        ValueError: n below 1.
    """
    grams = [gram for response in responses for gram in _grams(response, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def self_overlap(groups: Sequence[Sequence[Iterable[int | np.integer]]], n: int = 4) -> float:
    """Similarity of a prompt's responses: mean Jaccard overlap of their sets of token n-grams, in [0, 1].

    The mean is over a prompt's pairs of responses, then over prompts with at least one such pair. Pairs in
    which a response has fewer than n tokens do not count. nan without any pair. A simple alternative of ours
    to self-BLEU.

    Raises:
        ValueError: n below 1.
    """
    means = []
    for responses in groups:
        sets = [grams for response in responses if (grams := set(_grams(response, n)))]
        overlaps = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
        if overlaps:
            means.append(sum(overlaps) / len(overlaps))
    return sum(means) / len(means) if means else float("nan")


def longer_share(
    chosen_tokens: Int[np.ndarray, " pair"],
    rejected_tokens: Int[np.ndarray, " pair"],
    level: float = 0.95,
    groups: Int[np.ndarray, " pair"] | None = None,
) -> Rate:
    """Share of pairs whose chosen response is longer (equal counts as 0.5), with Wilson's interval.

    `groups`: prompt number of each pair; pairs of one prompt are not independent.
    """
    return win_rate((1 + np.sign(chosen_tokens - rejected_tokens)) / 2, level, groups)


def length_margin_correlation(
    chosen_tokens: Int[np.ndarray, " pair"],
    rejected_tokens: Int[np.ndarray, " pair"],
    margins: Float[np.ndarray, " pair"],
) -> float:
    """Spearman's rank correlation of |y_w| − |y_l| and the margin; nan if either is constant."""
    length, margin = _ranks((chosen_tokens - rejected_tokens).astype(np.float64)), _ranks(margins)
    if length.size < 2 or length.std() == 0 or margin.std() == 0:
        return float("nan")
    return float(np.mean((length - length.mean()) * (margin - margin.mean())) / (length.std() * margin.std()))


@dataclass(frozen=True)
class Alarm:
    """Whether a round's selection amplified a feature, with the evidence."""

    raised: bool
    counter_change: Rate
    """Change of reward accuracy on held-out pairs whose chosen answer has less of the feature."""
    aligned_change: Rate
    """The same for pairs whose chosen answer has more of it."""
    kept_share_excess: Rate
    """Share of "chosen has more" among the kept pairs minus that among all pairs."""
    comparison: str
    """Name of the comparison policy."""
    reason: str
    """`amplified`, `not_enough_evidence`, `counter_side_holds`, `both_sides_fall`, `selection_not_skewed`."""


def amplification_alarm(
    *,
    heldout_feature: Float[np.ndarray, " heldout"] | Int[np.ndarray, " heldout"],
    correct_now: Float[np.ndarray, " heldout"],
    correct_before: Float[np.ndarray, " heldout"],
    train_feature: Float[np.ndarray, " pair"] | Int[np.ndarray, " pair"],
    kept: Bool[np.ndarray, " pair"],
    comparison: str,
    seed: int,
    level: float = 0.95,
    min_pairs: int = MIN_PAIRS_A_SIDE,
    heldout_groups: Int[np.ndarray, " heldout"] | None = None,
    train_groups: Int[np.ndarray, " pair"] | None = None,
) -> Alarm:
    """Test whether training on the kept pairs made the policy rely on a feature, such as length. Rule: ours.

    The alarm is raised when all of these hold, each by a 95 % bootstrap interval:
    1. held-out pairs whose chosen answer has *less* of the feature: reward accuracy fell (interval below 0);
    2. held-out pairs whose chosen answer has more of it: accuracy did not fall (interval not below 0);
    3. the kept pairs' share of "chosen has more" exceeds all pairs' share (interval above 0).

    Held-out pairs with equal features are on neither side. A side with fewer than `min_pairs` pairs, or a
    round that kept fewer, is `not_enough_evidence`.

    Args:
        heldout_feature: feature of the chosen minus that of the rejected response; only the sign is used.
        correct_now: `correctness` of the held-out margins under the policy.
        correct_before: likewise under the comparison policy, the same pairs in the same order.
        train_feature: as heldout_feature, for the pairs the round selected from.
        kept: which of those pairs were kept.
        comparison: name of the comparison policy: the same round trained on a random selection if there is
            one, else the last head.
        heldout_groups: prompt number of each held-out pair; prompts are resampled, not pairs.
        train_groups: likewise for the pairs selected from.
    """

    def change(side: Bool[np.ndarray, " heldout"]) -> Rate:
        groups = None if heldout_groups is None else heldout_groups[side]
        return bootstrap_difference(
            correct_now[side], correct_before[side], seed=seed, level=level, groups=groups
        )

    counter, aligned = heldout_feature < 0, heldout_feature > 0
    fell, rose = change(counter), change(aligned)
    more = train_feature > 0
    excess = NO_RATE
    if kept.size:
        excess = bootstrap_excess(kept, more, seed=seed, level=level, groups=train_groups)

    if min(fell.independent, rose.independent, excess.n) < min_pairs:
        reason = "not_enough_evidence"
    elif not fell.high < 0:
        reason = "counter_side_holds"
    elif rose.high < 0:
        reason = "both_sides_fall"
    elif not excess.low > 0:
        reason = "selection_not_skewed"
    else:
        reason = "amplified"
    return Alarm(reason == "amplified", fell, rose, excess, comparison, reason)


def _grams(response: Iterable[int | np.integer], n: int) -> list[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"An n-gram has at least one token, but n = {n}.")
    ids = [int(token) for token in response]
    return list(zip(*(ids[i:] for i in range(n)), strict=False))  # the shifted lists have different lengths


def _ranks(values: Float[np.ndarray, " value"]) -> Float[np.ndarray, " value"]:
    """Ranks from 1; tied values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
