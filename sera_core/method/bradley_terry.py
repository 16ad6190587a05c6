"""Many arms on one scale from their pairwise comparisons, with style held equal.

    P(a preferred to b) = σ(θ_a − θ_b + Σ_f φ_f tanh(Δ_f / std Δ_f))

Bradley–Terry (1952) with terms for the difference Δ_f of a style feature, as in Arena-Hard-Auto's style
control (there linear; tanh is that of length-controlled AlpacaEval, arXiv 2404.04475). A tie is half a win
for each. Fitted by Newton's method with a ridge of 0.01 on every coefficient (ours), so that an arm that
always wins has a finite strength.
"""

import numpy as np
from jaxtyping import Float, Int

from sera_core.method.win_rates import NO_RATE, Groups, Rate

RIDGE = 1e-2
_CELLS = 4_000_000  # weights at once, to limit memory


def strengths(
    first: Int[np.ndarray, " comparison"],
    second: Int[np.ndarray, " comparison"],
    outcomes: Float[np.ndarray, " comparison"],
    arms: int,
    style: Float[np.ndarray, "comparison feature"] | None = None,
    *,
    groups: Groups,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> list[Rate]:
    """Each arm's win rate against arm 0 as the fit expects it, at equal style; 0.5 for arm 0 itself.

    Args:
        first, second: the arm of each comparison's answers, 0 … arms − 1.
        outcomes: 1 where the first is preferred, 0.5 a tie, 0 where the second is.
        arms: number of arms, at least 2.
        style: features of the first answer less those of the second; None: no control.
        groups: number of each comparison's prompt; prompts are resampled whole, for percentile intervals.
        seed: of the resamples.

    Raises:
        ValueError: arrays of different lengths, an arm outside the range or against itself, an outcome that
            is none, or a feature that is not finite.
    """
    n = outcomes.size
    style = np.zeros((n, 0)) if style is None else style
    _check(first, second, outcomes, arms, style, groups)
    if n == 0:
        return [NO_RATE] * arms
    design = np.concatenate([_sides(first, second, arms), _scaled(style)], axis=1)
    value = _expected(_fit(design, outcomes, np.ones((1, n))), arms)[0]
    kinds, numbers = np.unique(groups, return_inverse=True)
    count = len(kinds)
    if count < 2:
        return [Rate(float(v), float("nan"), float("nan"), n, count) for v in value]
    rng, chunk = np.random.default_rng(seed), max(1, _CELLS // n)
    found = []
    for start in range(0, resamples, chunk):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(chunk, resamples - start))
        found.append(_expected(_fit(design, outcomes, times[:, numbers].astype(np.float64)), arms))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    rows = zip(value, low, high, strict=True)
    return [Rate(float(v), float(below), float(above), n, count) for v, below, above in rows]


def _sides(
    first: Int[np.ndarray, " comparison"], second: Int[np.ndarray, " comparison"], arms: int
) -> Float[np.ndarray, "comparison arm"]:
    """+1 for the first answer's arm, −1 for the second's; arm 0 has no column, its θ is 0."""
    names = np.arange(1, arms)
    return (first[:, None] == names).astype(np.float64) - (second[:, None] == names)


def _scaled(style: Float[np.ndarray, "comparison feature"]) -> Float[np.ndarray, "comparison varying"]:
    """tanh(Δ / std Δ); a feature that never differs has no term."""
    spread = style.std(axis=0) if style.size else np.zeros(style.shape[1])
    return np.tanh(style[:, spread > 0] / spread[spread > 0])


def _fit(
    design: Float[np.ndarray, "n d"],
    outcomes: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "resample n"],
) -> Float[np.ndarray, "resample d"]:
    """Coefficients of the ridged logistic regression, for each row of weights at once."""
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    found = np.zeros((len(weights), size))
    for _ in range(50):
        p = 0.5 * (1 + np.tanh(0.5 * (found @ design.T)))  # σ, without overflow
        slope = (weights * (outcomes - p)) @ design - RIDGE * found
        curve = ((weights * p * (1 - p)) @ products).reshape(-1, size, size) + RIDGE * np.eye(size)
        step = np.linalg.solve(curve, slope[:, :, None])[:, :, 0]
        # A bounded step: far out the curve is flat and a full Newton step would overshoot.
        found += step / np.maximum(1, np.abs(step).max(axis=1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    return found


def _expected(fit: Float[np.ndarray, "resample d"], arms: int) -> Float[np.ndarray, "resample arm"]:
    """Win rates against arm 0."""
    theta = np.concatenate([np.zeros((len(fit), 1)), fit[:, : arms - 1]], axis=1)
    return 0.5 * (1 + np.tanh(0.5 * theta))


def _check(
    first: Int[np.ndarray, " first"],
    second: Int[np.ndarray, " second"],
    outcomes: Float[np.ndarray, " comparison"],
    arms: int,
    style: Float[np.ndarray, "row feature"],
    groups: Groups,
) -> None:
    sizes = {first.size, second.size, outcomes.size, len(style), groups.size}
    if len(sizes) > 1:
        raise ValueError(
            f"arms, outcomes, style and groups are of {sorted(sizes)} comparisons; give one each"
        )
    both = np.concatenate([first, second])
    if arms < 2 or (both.size and (both.min() < 0 or both.max() >= arms)) or (first == second).any():
        raise ValueError(f"every comparison is of two different arms, 0 to {arms - 1}")
    if not np.isin(outcomes, (0.0, 0.5, 1.0)).all():
        raise ValueError("an outcome is 1 (win), 0.5 (tie) or 0 (loss); leave out failed judgements")
    if not np.isfinite(style).all():
        raise ValueError("a style feature is not finite; leave it out")
