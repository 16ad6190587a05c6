"""What preference pairs hold: lengths, and what the chosen answers have more of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sera_core.data.differences import last_text
from sera_core.data.preferences import Pair
from sera_core.method.estimates import Estimate, Resampled, estimate, prompts_in, ratio
from sera_core.method.panel import FEATURES, feature_differences


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts, in tokens or words."""

    median: float
    p95: float
    most: int


def lengths(counts: Sequence[int]) -> Lengths:
    """Median, 95th percentile and maximum of at least one length."""
    median, p95 = np.quantile(counts, [0.5, 0.95])
    return Lengths(float(median), float(p95), max(counts))


def text_differences(pairs: Sequence[Pair]) -> dict[str, Float[np.ndarray, " pair"]]:
    """Feature of the chosen answer less that of the rejected one, for every built-in feature of the text."""
    texts = (
        [last_text(pair.prompt, "user") for pair in pairs],
        [last_text(pair.chosen, "assistant") for pair in pairs],
        [last_text(pair.rejected, "assistant") for pair in pairs],
    )
    return feature_differences(dict(FEATURES.entries), *texts)


def chosen_has_more(
    differences: Mapping[str, Float[np.ndarray, " pair"]], prompt_ids: Sequence[str], seed: int = 0
) -> dict[str, Estimate]:
    """How often the chosen answer has more of a feature, of the pairs whose answers differ in it.

    Far from 0.5, a policy can learn the feature instead of the preference. Prompts are resampled for the
    95 % interval; not measurable where no answers differ.

    Args:
        differences: chosen less rejected, by feature, in the order of the pairs.
        prompt_ids: of the pairs.
        seed: of the resampling.
    """
    groups = np.unique(np.asarray(prompt_ids), return_inverse=True)[1]
    found = {}
    for name, values in differences.items():
        differ = values != 0
        sample = Resampled(np.stack([values > 0, differ], axis=1).astype(np.float64), groups, seed)
        found[name] = estimate(
            sample,
            lambda sums: ratio(sums[:, 0], sums[:, 1]),
            pairs=int(differ.sum()),
            prompts=prompts_in(groups, differ),
        )
    return found
