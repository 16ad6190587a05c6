"""Whether a policy lost a capability: scores on the items of fixed tasks, paired with the start policy's."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from sera_core.method.estimates import Estimate, Quantity, Resampled, check_finite, ratio, simultaneous

Scores = Mapping[str, Float[np.ndarray, " item"]]
"""By task: the score of each item in [0, 1]."""


def capability_changes(
    now: Scores, start: Scores, *, seed: int, resamples: int = 2000, level: float = 0.90
) -> dict[str, Estimate]:
    """Each task's mean score less the start policy's, item by item, with simultaneous intervals.

    Args:
        now, start: the same items of the same tasks, in the same order.
        seed: of the resamples.
        level: joint level of the two-sided intervals: a drop is tested one-sided at half of the rest.

    Raises:
        ValueError: other tasks or items, or a score that is no finite number.
    """
    if now.keys() != start.keys():
        raise ValueError(f"The tasks {sorted(now)} are not the start policy's {sorted(start)}.")
    names = sorted(now)
    sizes = []
    for name in names:
        check_finite({f"{name} now": now[name], f"{name} at the start": start[name]})
        sizes.append(len(now[name]))
    if not names:
        return {}
    columns = np.zeros((sum(sizes), 2 * len(names)))
    ends = np.cumsum([0, *sizes])
    for at, name in enumerate(names):
        rows = slice(ends[at], ends[at + 1])
        columns[rows, 2 * at] = 1
        columns[rows, 2 * at + 1] = now[name] - start[name]
    sample = Resampled(columns, None, seed, resamples)
    parts = {name: _mean(at) for at, name in enumerate(names)}
    found = simultaneous(sample, parts, pairs=sum(sizes), prompts=sum(sizes), level=level)
    return {
        name: Estimate(held.value, held.low, held.high, size, size)
        for size, (name, held) in zip(sizes, found.items(), strict=True)
    }


def _mean(at: int) -> Quantity:
    return lambda sums: ratio(sums[:, 2 * at + 1], sums[:, 2 * at])


def lost(changes: Mapping[str, Estimate], tolerance: float) -> str:
    """The tasks whose score surely fell, by at least `tolerance`, in words; empty if none did."""
    fallen = [
        f"{name} by {change.in_words(signed=True, of='items')}"
        for name, change in changes.items()
        if change.value is not None
        and change.high is not None
        and change.high < 0
        and change.value <= -tolerance
    ]
    return f"the policy lost capabilities against the start policy: {'; '.join(fallen)}" if fallen else ""
