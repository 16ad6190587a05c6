"""What a selection does to a feature: its share and its correlation with the margin, before and after."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.correlation import partial_rank_correlation, rank_correlation
from sera_core.method.estimates import Estimate, Resampled, check_finite, estimate, prompts_in, ratio


@dataclass(frozen=True)
class Side:
    """A feature among pairs."""

    more: Estimate
    """Share of the pairs whose chosen answer has more of it."""
    correlation: Estimate
    """Spearman's rank correlation of its difference and the margin."""
    after_length: Estimate
    """The same, given the difference in length; not measurable for length itself."""


@dataclass(frozen=True)
class Selected:
    """A feature before and after a selection."""

    before: Side
    """Among all pairs that the round could select from."""
    after: Side
    """Among those it kept."""
    excess: Estimate
    """Share with more of it among the kept pairs less that among all."""


def selected(
    difference: Float[np.ndarray, " pair"],
    margins: Float[np.ndarray, " pair"],
    kept: Bool[np.ndarray, " pair"],
    length_difference: Float[np.ndarray, " pair"],
    groups: Int[np.ndarray, " pair"] | None = None,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Selected:
    """What keeping these pairs does to a feature, with cluster bootstrap intervals.

    Args:
        difference: the feature of the chosen answer less that of the rejected one, in its unit.
        margins: what the selection went by, in nats.
        kept: which pairs were kept.
        length_difference: length of the chosen answer less that of the rejected one.
        groups: number of each pair's prompt; None: each pair stands for itself.
        seed: of the resamples.

    Raises:
        ValueError: arrays of different lengths, or a value that is no finite number.
    """
    check_finite({"difference": difference, "margins": margins, "length_difference": length_difference})
    how = {"seed": seed, "resamples": resamples, "level": level}
    more = difference > 0
    columns = np.stack([np.ones_like(more), more, kept, more & kept], axis=1).astype(np.float64)
    sample = Resampled(columns, groups, seed, resamples)

    def side(rows: Bool[np.ndarray, " pair"], count: int) -> Side:
        part = None if groups is None else groups[rows]
        d, m, length = difference[rows], margins[rows], length_difference[rows]
        share = estimate(
            sample, _share(count), pairs=int(rows.sum()), prompts=prompts_in(groups, rows), level=level
        )
        return Side(
            share, rank_correlation(d, m, part, **how), partial_rank_correlation(d, m, length, part, **how)
        )

    excess = estimate(
        sample,
        lambda sums: _share(2)(sums) - _share(0)(sums),
        pairs=int(kept.sum()),
        prompts=prompts_in(groups, kept),
        level=level,
    )
    return Selected(side(np.ones_like(kept), 0), side(kept, 2), excess)


def _share(count: int):
    """Share of hits, from the columns (count, hits) at this place."""
    return lambda sums: ratio(sums[:, count + 1], sums[:, count])
