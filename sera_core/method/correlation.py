"""Rank correlations with cluster bootstrap intervals, plain and after a third variable."""

import numpy as np
from jaxtyping import Float, Int

from sera_core.method.estimates import Estimate, Resampled, check_finite, estimate, prompts_in, ratio

_TINY = 1e-12  # a rounding of 0 in a variance of ranks that are scaled to [0, 1]


def rank_correlation(
    x: Float[np.ndarray, " pair"],
    y: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Spearman's rank correlation (Spearman 1904), tied values sharing the mean of their ranks.

    The resamples keep the ranks of the whole sample. Not measurable where a variable is constant.

    Args:
        x, y: paired values; only their order counts.
        groups: number of each pair's prompt; None: each pair stands for itself.

    Raises:
        ValueError: different lengths, or a value that is no finite number.
    """
    check_finite({"x": x, "y": y})
    columns = _products([_scaled_ranks(x), _scaled_ranks(y)])
    return _correlated(
        columns, lambda sums: _pearson(_moments(sums, 2), 0, 1), groups, seed, resamples, level
    )


def partial_rank_correlation(
    x: Float[np.ndarray, " pair"],
    y: Float[np.ndarray, " pair"],
    given: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Partial rank correlation of x and y after z: what is left where z is held.

        r_xy.z = (r_xy − r_xz r_yz) / √((1 − r_xz²)(1 − r_yz²))          Kendall and Stuart 1973, section 27

    with Spearman's r. Not measurable where a variable is constant, or where z orders the pairs as x or y
    does.

    Args:
        x, y, given: paired values; only their order counts.
        groups: number of each pair's prompt; None: each pair stands for itself.

    Raises:
        ValueError: different lengths, or a value that is no finite number.
    """
    check_finite({"x": x, "y": y, "given": given})
    columns = _products([_scaled_ranks(values) for values in (x, y, given)])
    return _correlated(columns, _partial, groups, seed, resamples, level)


def _partial(sums: Float[np.ndarray, "resample column"]) -> Float[np.ndarray, " resample"]:
    moments = _moments(sums, 3)
    xy, xz, yz = (_pearson(moments, *places) for places in ((0, 1), (0, 2), (1, 2)))
    left = (1 - xz**2) * (1 - yz**2)
    return ratio(xy - xz * yz, np.sqrt(np.where(left > _TINY, left, 0)))


def _correlated(columns: np.ndarray, quantity, groups, seed: int, resamples: int, level: float) -> Estimate:
    pairs = len(columns)
    prompts = prompts_in(groups, np.ones(pairs, dtype=bool))
    if pairs < 2:
        return Estimate(None, None, None, pairs, prompts)
    sample = Resampled(columns, groups, seed, resamples)
    return estimate(sample, quantity, pairs=pairs, prompts=prompts, level=level)


def _scaled_ranks(values: np.ndarray) -> np.ndarray:
    """Mid-ranks in (0, 1]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[inverse]) / max(1, len(values))


def _products(ranks: list[np.ndarray]) -> Float[np.ndarray, "pair column"]:
    """1, each variable, and each product of two."""
    k = len(ranks)
    products = [ranks[i] * ranks[j] for i in range(k) for j in range(i, k)]
    return np.stack([np.ones_like(ranks[0]), *ranks, *products], axis=1)


def _moments(sums: np.ndarray, k: int) -> np.ndarray:
    """Covariance matrix [resample, k, k] from sums of `_products`."""
    means = sums[:, 1:] / sums[:, :1]
    first, second = means[:, :k], means[:, k:]
    covariance = np.empty((len(sums), k, k))
    places = [(i, j) for i in range(k) for j in range(i, k)]
    for column, (i, j) in enumerate(places):
        covariance[:, i, j] = covariance[:, j, i] = second[:, column] - first[:, i] * first[:, j]
    return covariance


def _pearson(covariance: np.ndarray, i: int, j: int) -> np.ndarray:
    spread = covariance[:, i, i] * covariance[:, j, j]
    both = (covariance[:, i, i] > _TINY) & (covariance[:, j, j] > _TINY)
    return ratio(covariance[:, i, j], np.sqrt(np.where(both, spread, 0)))
