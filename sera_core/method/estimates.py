"""Estimates with intervals that resample prompts, several at a time where they are compared together.

The cluster bootstrap (Davison and Hinkley 1997, section 3.8): pairs of one prompt move together, so whole
prompts are drawn. Every quantity here is a function of column sums, so a resample is a row of weights times
the prompts' sums. The weights hang on the seed and the number of prompts alone: the same arrays give the same
interval, and two quantities of one round are resampled alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Float, Int

from sera_core.method.win_rates import Rate

Sums = Float[np.ndarray, "resample column"]
Quantity = Callable[[Sums], Float[np.ndarray, " resample"]]
"""A quantity from sums over pairs, one value a row; nan where a row cannot tell."""

_CELLS = 4_000_000  # weights held at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its interval and what it rests on; None where it cannot be measured."""

    value: float | None
    low: float | None
    high: float | None
    pairs: int
    """Pairs that the value is of."""
    prompts: int
    """Different prompts of those pairs: what is resampled."""

    @property
    def measurable(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def rate(self) -> Rate:
        """The same as a Rate, in which nan stands for None."""
        value, low, high = (float("nan") if x is None else x for x in (self.value, self.low, self.high))
        return Rate(value, low, high, self.pairs, self.prompts)

    def in_words(self, signed: bool = False, of: str = "pairs") -> str:
        """In words: value, interval and number of pairs, or what else the value is of."""
        if self.value is None:
            return f"not measurable on {self.pairs} {of}"
        sign = "+" if signed else ""
        ends = "" if self.low is None else f" [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"
        return f"{self.value:{sign}.3f}{ends} on {self.pairs} {of}"


def prompt_sums(
    columns: Float[np.ndarray, "pair column"], groups: Int[np.ndarray, " pair"] | None
) -> Float[np.ndarray, "prompt column"]:
    """Sums of each prompt's pairs; groups None: each pair stands for itself."""
    if groups is None:
        return columns
    kinds, numbers = np.unique(groups, return_inverse=True)
    return np.stack([np.bincount(numbers, column, len(kinds)) for column in columns.T], axis=1)


@dataclass(frozen=True)
class Resampled:
    """Columns over pairs, and their sums over as many prompts drawn with replacement as there are."""

    columns: Float[np.ndarray, "pair column"]
    groups: Int[np.ndarray, " pair"] | None
    """Number of each pair's prompt; None: each pair stands for itself."""
    seed: int
    resamples: int = 2000

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise ValueError(f"An interval needs at least two resamples, but resamples = {self.resamples}.")

    @cached_property
    def total(self) -> Sums:
        """Sums over all pairs: one row."""
        return self.columns.sum(axis=0, keepdims=True)

    @cached_property
    def draws(self) -> Sums:
        """Sums over the prompts drawn: a row a resample."""
        sums = prompt_sums(self.columns, self.groups)
        prompts = len(sums)
        if prompts * self.resamples <= _CELLS:
            return _weights(self.seed, prompts, self.resamples) @ sums
        rng, step = np.random.default_rng(self.seed), max(1, _CELLS // prompts)
        sizes = [min(step, self.resamples - start) for start in range(0, self.resamples, step)]
        return np.concatenate([_drawn(rng, prompts, size) @ sums for size in sizes])

    def value(self, quantity: Quantity) -> float | None:
        """The quantity of all pairs; None where it cannot be measured."""
        value = float(quantity(self.total)[0])
        return value if np.isfinite(value) else None


@lru_cache(maxsize=4)
def _weights(seed: int, prompts: int, resamples: int) -> Float[np.ndarray, "resample prompt"]:
    return _drawn(np.random.default_rng(seed), prompts, resamples)


def _drawn(rng: np.random.Generator, prompts: int, resamples: int) -> Float[np.ndarray, "resample prompt"]:
    """How often each prompt is drawn in each resample."""
    drawn = rng.integers(0, prompts, (resamples, prompts)) + prompts * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * prompts).reshape(resamples, prompts).astype(float)


def estimate(
    sample: Resampled, quantity: Quantity, *, pairs: int, prompts: int, level: float = 0.95
) -> Estimate:
    """A quantity with its percentile bootstrap interval.

    Args:
        sample: columns whose sums the quantity is a function of.
        pairs, prompts: what the value is of, for the record.

    Not measurable where the quantity is nan; without an interval where fewer than two prompts stand behind
    it.

    Raises:
        ValueError: a level outside (0, 1).
    """
    _check_level(level)
    value = sample.value(quantity)
    if value is None or prompts < 2:
        return Estimate(value, None, None, pairs, prompts)
    draws = quantity(sample.draws)
    draws = draws[np.isfinite(draws)]
    if not draws.size:
        return Estimate(value, None, None, pairs, prompts)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), pairs, prompts)


def simultaneous(
    sample: Resampled, quantities: Mapping[str, Quantity], *, pairs: int, prompts: int, level: float = 0.95
) -> dict[str, Estimate]:
    """Several quantities with intervals that hold all together at the level: the max-t bootstrap.

        value_k ± c · s_k,   c the level's quantile of max_k |draw_k − value_k| / s_k

    s_k is the standard deviation of the draws (Westfall and Young 1993; Hothorn, Bretz and Westfall 2008).
    Unlike Bonferroni's intervals these use that comparisons of one round are alike. A quantity that no draw
    moves has the interval [value, value].

    Raises:
        ValueError: a level outside (0, 1).
    """
    _check_level(level)
    values = {name: sample.value(quantity) for name, quantity in quantities.items()}
    blank = {name: Estimate(value, None, None, pairs, prompts) for name, value in values.items()}
    known = [name for name, value in values.items() if value is not None]
    if prompts < 2 or not known:
        return blank
    draws = np.stack([quantities[name](sample.draws) for name in known], axis=1)
    draws = draws[np.isfinite(draws).all(axis=1)]
    if len(draws) < 2:
        return blank
    centre = np.array([values[name] for name in known], dtype=np.float64)
    spread = draws.std(axis=0, ddof=1)
    moving = spread > 1e-12
    half = np.zeros(len(known))
    if moving.any():
        largest = (np.abs(draws - centre)[:, moving] / spread[moving]).max(axis=1)
        half[moving] = np.quantile(largest, level) * spread[moving]
    ends = {name: (c - h, c + h) for name, c, h in zip(known, centre.tolist(), half.tolist(), strict=True)}
    return blank | {name: Estimate(values[name], *ends[name], pairs, prompts) for name in known}


def prompts_in(groups: Int[np.ndarray, " pair"] | None, of: np.ndarray) -> int:
    """Number of different prompts among the pairs marked in `of`."""
    return int(of.sum()) if groups is None else len(np.unique(groups[of]))


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, nan where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval must lie between 0 and 1, such as 0.95, but is {level}.")


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays of different lengths, and values that are no finite numbers.

    Raises:
        ValueError: names the array and the first row.
    """
    sizes = {name: len(values) for name, values in arrays.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"The arrays must be of the same pairs in the same order, but their lengths are {told}."
        )
    for name, values in arrays.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(
                f"{bad.size} of {len(values)} values of {name} are not finite (first: row {bad[0]}); leave "
                "these pairs out everywhere, and report how many there were."
            )
