"""Numerical noise in rewards, and the smallest margin above the noise.

Log-probabilities have rounding errors that depend on the dtype. A few responses are computed again by the
plain loop in float32; the difference of the rewards is the error. The method is ours.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import erf, pi, sqrt

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
"""Share of pairs without a true difference whose margin is below the noise floor."""


@dataclass(frozen=True)
class Noise:
    """Numerical error of one response's reward."""

    sigma: float
    """Root mean square error, in the unit of the rewards."""
    n: int
    """Number of responses it was measured on."""


def response_noise(rewards: Float[np.ndarray, " response"], exact: Float[np.ndarray, " response"]) -> Noise:
    """Root mean square error of a response's reward; 0 if there is no finite value.

        σ = √ mean (r − r_exact)²

    Args:
        rewards: rewards as used by review and pairing.
        exact: the same from float32 log-probabilities, each response computed separately.
    """
    errors = (rewards - exact)[np.isfinite(rewards) & np.isfinite(exact)]
    return Noise(float(np.sqrt(np.mean(errors**2))) if errors.size else 0.0, int(errors.size))


def noise_floor(noise: Noise, responses: int) -> float:
    """The margin that noise alone does not exceed in 95 % of cases, in the unit of sigma.

        floor = q · σ,   P((max − min of R normals) / s ≤ q) = 0.95

    A human pair has two responses. A generated pair is the best and the worst of R, which differ more by
    chance. q is the quantile of the studentised range (Tukey 1949) with n degrees of freedom, as sigma is
    measured on n responses: with n = 12, q is 3.08 for a human pair and 5.12 for R = 8.

    Args:
        noise: noise of one response.
        responses: R, number of responses the pair was chosen from, >= 2.

    Raises:
        ValueError: fewer than two responses.
    """
    if responses < 2:
        raise ValueError(f"a pair is chosen from at least two responses, not from {responses}")
    return studentised_range(responses, noise.n) * noise.sigma if noise.sigma else 0.0


@lru_cache(maxsize=32)
def studentised_range(count: int, freedom: int) -> float:
    """95 % quantile of the range of `count` normals divided by an independent estimate of their deviation.

        P(range ≤ w) = R ∫ φ(z) [Φ(z + w) − Φ(z)]^(R−1) dz,   P(range / s ≤ q) = ∫ f(s) P(range ≤ q s) ds

    f is the density of √(χ²_n / n). Integrals are sums over a grid, the quantile is found by bisection.
    """
    z = np.linspace(-9, 9, 1801)
    below = _normal(z)
    widths = np.linspace(0, 18, 1801)
    shifted = np.interp(z[:, None] + widths, z, below)
    density = np.exp(-(z**2) / 2)[:, None] * (shifted - below[:, None]) ** (count - 1)
    within = count * density.sum(0) * (z[1] - z[0]) / sqrt(2 * pi)
    s = np.linspace(0.01, 5, 2000)
    log_f = (freedom - 1) * np.log(s) - freedom * s**2 / 2
    weight = np.exp(log_f - log_f.max())
    weight /= weight.sum()
    low, high = 0.0, 200.0
    while high - low > 1e-6:
        q = (low + high) / 2
        reached = float(weight @ np.interp(q * s, widths, within)) > LEVEL
        low, high = (low, q) if reached else (q, high)
    return high


def _normal(z: np.ndarray) -> np.ndarray:
    """Distribution function of the standard normal."""
    return np.array([(1 + erf(value / sqrt(2))) / 2 for value in z])
