"""Rates with confidence intervals: win rate, order-swap agreement, length-controlled win rate, bootstrap."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

_CELLS = 4_000_000  # random indices per chunk, to limit memory
_RIDGE = 1e-2  # keeps the logistic fit finite if one policy wins every comparison; ours


Groups = Int[np.ndarray, " value"]
"""Group (prompt) number of each value."""


@dataclass(frozen=True)
class Rate:
    """A mean with its interval and number of observations; nan if there are too few."""

    value: float
    low: float
    high: float
    n: int
    groups: int | None = None
    """Number of independent groups (prompts); None: each observation is a group."""

    @property
    def independent(self) -> int:
        """Number of independent observations."""
        return self.n if self.groups is None else self.groups


NO_RATE = Rate(float("nan"), float("nan"), float("nan"), 0)


def wilson_interval(successes: float | int, n: int, level: float = 0.95) -> Rate:
    """Share of successes with Wilson's score interval (Wilson 1927).

        centre = (p + z²/2n) / (1 + z²/n),   half width = z √(p(1−p)/n + z²/4n²) / (1 + z²/n)

    A tie counts as half a success, for which the interval is conservative.

    Raises:
        ValueError: successes outside [0, n], or a level outside (0, 1).
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} are impossible; count each observation once.")
    if n == 0:
        return NO_RATE
    return Rate(successes / n, *_wilson(float(successes / n), float(n), level), n)


def _wilson(p: float, n: float, level: float) -> tuple[float, float]:
    """Ends of Wilson's interval; n may be an effective number."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = p + z2 / (2 * n)
    half = (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    # At p = 0 and p = 1 the ends are exactly 0 and 1; float64 may miss them by a bit.
    return max(0.0, low) if p > 0 else 0.0, min(1.0, high) if p < 1 else 1.0


def win_rate(
    outcomes: Float[np.ndarray, " comparison"], level: float = 0.95, groups: Groups | None = None
) -> Rate:
    """Mean of wins (1), ties (0.5) and losses (0), with Wilson's interval; 0.5 is a draw between policies.

    Outcomes of one group (a prompt) are not independent. Wilson's n is then the effective sample size (Kish
    1965: n over the design effect), or the number of groups if all outcomes are equal.

    Args:
        outcomes: 0, 0.5 or 1 each.
        groups: group of each outcome; None: each is independent.

    Raises:
        ValueError: an outcome that is not 0, 0.5 or 1.
    """
    _check_outcomes(outcomes)
    found = _grouped(outcomes, groups)
    if found is None or not outcomes.size:
        return wilson_interval(float(outcomes.sum()), outcomes.size, level)
    sums, sizes = found
    p, count = float(outcomes.mean()), len(sums)
    spread = float(((sums - p * sizes) ** 2).sum()) * count / max(1, count - 1) / outcomes.size**2
    effective = p * (1 - p) / spread if spread > 0 else count
    ends = _wilson(p, float(min(outcomes.size, max(1.0, effective))), level)
    return Rate(p, *ends, outcomes.size, count)


def order_swap_agreement(
    first: Float[np.ndarray, " first"],
    swapped: Float[np.ndarray, " swapped"],
    level: float = 0.95,
    groups: Groups | None = None,
) -> Rate:
    """Share of comparisons with the same outcome when the judge sees the two answers in the other order.

    Both outcomes are for the same policy: a judge that always prefers the first answer gives 1 and 0, an
    agreement of 0. The interval is that of `win_rate`.

    Raises:
        ValueError: an outcome that is not 0, 0.5 or 1, or different numbers of comparisons.
    """
    _check_outcomes(first)
    _check_outcomes(swapped)
    if first.size != swapped.size:
        raise ValueError(
            f"{first.size} outcomes cannot agree with {swapped.size}; judge every comparison both ways."
        )
    return win_rate((first == swapped).astype(np.float64), level, groups)


def bootstrap_interval(
    values: Float[np.ndarray, " value"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Groups | None = None,
) -> Rate:
    """Mean with its percentile bootstrap interval (Efron 1979).

    Values of one group (pairs of one prompt) are not independent, so whole groups are resampled: the cluster
    bootstrap (Davison and Hinkley 1997, section 3.8). Without values the rate is nan; a single value or group
    has a mean but no interval.

    Args:
        groups: group of each value; None: each is independent.

    Raises:
        ValueError: a value that is not finite, fewer than one resample, a level outside (0, 1).
    """
    _check_bootstrap(values, resamples, level)
    if values.size < 2:
        return _without_interval(values)
    rng, found = np.random.default_rng(seed), _grouped(values, groups)
    if found is None:
        means = _resampled_means(values, rng, resamples)
        return Rate(float(values.mean()), *_percentiles(means, level), values.size)
    sums, sizes = found
    if len(sums) == 1:
        return Rate(float(values.mean()), float("nan"), float("nan"), values.size, 1)
    means = _resampled_ratios(sums, sizes, rng, resamples)
    return Rate(float(values.mean()), *_percentiles(means, level), values.size, len(sums))


def bootstrap_difference(
    a: Float[np.ndarray, " a"],
    b: Float[np.ndarray, " b"],
    *,
    seed: int,
    paired: bool = True,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Groups | None = None,
) -> Rate:
    """mean(a) − mean(b) with its percentile bootstrap interval.

    Paired: a and b are of the same items in the same order, and items, or whole groups of them, are
    resampled. Not paired: each side is resampled by itself, without groups, and n is the smaller side.

    Raises:
        ValueError: paired sides of different length, a value that is not finite, a bad number of resamples or
            level.
    """
    if paired:
        if a.size != b.size:
            raise ValueError(
                f"A paired difference needs the same items on both sides, but there are {a.size} and "
                f"{b.size}; align them by id, or pass paired=False."
            )
        return bootstrap_interval(a - b, seed=seed, resamples=resamples, level=level, groups=groups)
    _check_bootstrap(a, resamples, level)
    _check_bootstrap(b, resamples, level)
    n = min(a.size, b.size)
    if n == 0:
        return NO_RATE
    value = float(a.mean() - b.mean())
    if n == 1:
        return Rate(value, float("nan"), float("nan"), 1)
    rng = np.random.default_rng(seed)
    differences = _resampled_means(a, rng, resamples) - _resampled_means(b, rng, resamples)
    return Rate(value, *_percentiles(differences, level), n)


def bootstrap_excess(
    part: Bool[np.ndarray, " row"],
    hit: Bool[np.ndarray, " row"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Groups | None = None,
) -> Rate:
    """Share of hits in a part minus the share of hits in the whole, with its percentile bootstrap interval.

        mean(hit | part) − mean(hit)

    Rows, or whole groups of rows, are resampled. The quantity depends on only four counts, so the resamples
    are multinomial draws of groups with equal counts. n is the size of the part.

    Raises:
        ValueError: different numbers of rows, a bad number of resamples or level.
    """
    _check_bootstrap(np.zeros(0), resamples, level)
    cells = np.stack([part & hit, part & ~hit, ~part & hit, ~part & ~hit], axis=1).astype(np.int64)
    counts = cells.sum(axis=0, keepdims=True)
    inside = int(part.sum())
    if inside == 0:
        return NO_RATE

    def excess(cells: Int[np.ndarray, "resample 4"]) -> Float[np.ndarray, " resample"]:
        part_hit, part_miss, rest_hit, _ = cells.T
        return part_hit / (part_hit + part_miss) - (part_hit + rest_hit) / cells.sum(axis=1)

    found = None if groups is None else _numbered(groups)
    if found is not None:
        cells = np.stack([np.bincount(found, column).astype(np.int64) for column in cells.T], axis=1)
    kinds, number = np.unique(cells, axis=0, return_counts=True)
    times = np.random.default_rng(seed).multinomial(len(cells), number / len(cells), size=resamples)
    draws = times @ kinds
    draws = draws[draws[:, :2].sum(axis=1) > 0]  # drop resamples with an empty part
    ends = _percentiles(excess(draws), level)
    return Rate(float(excess(counts)[0]), *ends, inside, None if found is None else len(cells))


def length_controlled_win_rate(
    outcomes: Float[np.ndarray, " comparison"],
    length_difference: Float[np.ndarray, " length"] | Int[np.ndarray, " length"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    groups: Groups | None = None,
) -> Rate:
    """Estimated win rate if both answers were equally long, with its percentile bootstrap interval.

        P(win) = σ(θ + φ tanh(Δ / std Δ)),   answer: σ(θ)

    The length term is that of length-controlled AlpacaEval (arXiv 2404.04475); its instruction term is left
    out. Fitted by Newton's method with a ridge of 0.01 on both coefficients (ours), so that a policy that
    wins always has a finite fit.

    Args:
        outcomes: wins (1), ties (0.5) and losses (0) of the judged policy.
        length_difference: Δ, its answer's length minus the other's, in any unit.
        groups: group (prompt) of each comparison, resampled as a whole; None: each is independent.

    Raises:
        ValueError: an outcome that is not 0, 0.5 or 1, different numbers of comparisons, a length that is not
            finite.
    """
    _check_outcomes(outcomes)
    _check_bootstrap(length_difference.astype(np.float64), resamples, level)
    if outcomes.size != length_difference.size:
        raise ValueError(
            f"There are {outcomes.size} outcomes but {length_difference.size} length differences."
        )
    n = outcomes.size
    if n == 0:
        return NO_RATE
    spread = length_difference.std()
    x = np.tanh(length_difference / spread) if spread > 0 else np.zeros(n)
    value = float(_win_at_equal_length(outcomes, x, np.ones((1, n)))[0])
    numbers = None if groups is None else _numbered(groups)
    count = n if numbers is None else int(numbers.max()) + 1
    if count == 1:
        return Rate(value, float("nan"), float("nan"), n, None if numbers is None else 1)
    rng, chunk = np.random.default_rng(seed), max(1, _CELLS // (8 * n))
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    equal = np.full(count, 1 / count)
    draws = (rng.multinomial(count, equal, size=k).astype(np.float64) for k in sizes)
    weights = (times if numbers is None else times[:, numbers] for times in draws)
    fits = [_win_at_equal_length(outcomes, x, some) for some in weights]
    return Rate(value, *_percentiles(np.concatenate(fits), level), n, None if numbers is None else count)


def _win_at_equal_length(
    y: Float[np.ndarray, " n"], x: Float[np.ndarray, " n"], weights: Float[np.ndarray, "resample n"]
) -> Float[np.ndarray, " resample"]:
    """σ(θ) of the ridged logistic regression of y on (1, x), for each row of weights at once."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(50):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        residual, curve = weights * (y - p), weights * p * (1 - p)
        slope0, slope1 = residual.sum(1) - _RIDGE * theta, residual @ x - _RIDGE * phi
        h00, h01, h11 = curve.sum(1) + _RIDGE, curve @ x, curve @ (x * x) + _RIDGE
        det = h00 * h11 - h01 * h01
        step0, step1 = (h11 * slope0 - h01 * slope1) / det, (h00 * slope1 - h01 * slope0) / det
        # A bounded step: far out the curve is flat and a full Newton step would overshoot.
        scale = 1 / np.maximum(1, np.maximum(np.abs(step0), np.abs(step1)))
        theta, phi = theta + scale * step0, phi + scale * step1
        if max(np.abs(step0).max(), np.abs(step1).max()) < 1e-10:
            break
    return _sigmoid(theta)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


def _resampled_means(
    values: Float[np.ndarray, " value"], rng: np.random.Generator, resamples: int
) -> Float[np.ndarray, " resample"]:
    chunk = max(1, _CELLS // values.size)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate(
        [values[rng.integers(0, values.size, (k, values.size))].mean(axis=1) for k in sizes]
    )


def _resampled_ratios(
    sums: Float[np.ndarray, " group"],
    sizes: Float[np.ndarray, " group"],
    rng: np.random.Generator,
    resamples: int,
) -> Float[np.ndarray, " resample"]:
    """Mean over all values of the groups drawn: sum of sums over sum of sizes."""
    chunk, found = max(1, _CELLS // sums.size), []
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, sums.size, (min(chunk, resamples - start), sums.size))
        found.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(found)


def _grouped(
    values: Float[np.ndarray, " value"], groups: Groups | None
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]] | None:
    """Sum and size of each group; None if every value is its own group."""
    numbers = None if groups is None else _numbered(groups)
    if numbers is None:
        return None
    return np.bincount(numbers, values), np.bincount(numbers).astype(np.float64)


def _numbered(groups: Groups) -> Int[np.ndarray, " value"] | None:
    """Groups numbered from 0; None if every value is its own group."""
    kinds, numbers = np.unique(groups, return_inverse=True)
    return None if len(kinds) == groups.size else numbers.astype(np.int64)


def _percentiles(resampled: Float[np.ndarray, " resample"], level: float) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _without_interval(values: Float[np.ndarray, " value"]) -> Rate:
    return Rate(float(values[0]), float("nan"), float("nan"), 1) if values.size else NO_RATE


def _check_outcomes(outcomes: Float[np.ndarray, " comparison"]) -> None:
    bad = np.flatnonzero(~np.isin(outcomes, (0.0, 0.5, 1.0)))
    if bad.size:
        raise ValueError(
            f"An outcome is 1 (win), 0.5 (tie) or 0 (loss), but comparison {bad[0]} has {outcomes[bad[0]]}; "
            "leave failed judgements out and count them."
        )


def _check_bootstrap(values: Float[np.ndarray, " value"], resamples: int, level: float) -> None:
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"The bootstrap needs at least one resample, but resamples = {resamples}.")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {values.size} values are not finite (first: {bad[0]}), so they have no mean; "
            "leave them out and report how many there were."
        )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval must lie between 0 and 1, such as 0.95, but is {level}.")
