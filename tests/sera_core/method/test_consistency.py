"""CREAM's consistency of two rankings, against scipy's Kendall τ and by hand."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from sera_core.method.consistency import ranking_consistency


def test_without_ties_it_is_the_mean_of_kendalls_tau_moved_to_0_to_1():
    rng = np.random.default_rng(5)
    sizes = rng.integers(2, 9, 40)
    prompts = np.repeat(rng.permutation(40), sizes)
    newer, older = rng.normal(size=prompts.size), rng.normal(size=prompts.size)
    taus = [kendalltau(newer[prompts == p], older[prompts == p]).statistic for p in range(40)]
    assert ranking_consistency(newer, older, prompts) == pytest.approx((np.mean(taus) + 1) / 2)
    assert ranking_consistency(newer, 3 * newer - 1, prompts) == 1.0
    assert ranking_consistency(newer, -newer, prompts) == 0.0


@pytest.mark.parametrize(
    ("newer", "older", "agreement"),
    [
        ([1, 2, 2], [5, 7, 7], 1.0),  # the same text twice: two pairs are left, both alike
        ([1, 2, 2], [5, 7, 6], (2 / 3 + 1) / 2),  # one head tells the last two apart: neither alike nor not
        ([1, 2, np.nan], [2, 1, 3], 0.0),
        ([1, 1], [4, 4], None),
        ([1], [2], None),
        ([], [], None),
    ],
)
def test_equal_and_missing_rewards(newer, older, agreement):
    given = (np.array(newer, dtype=float), np.array(older, dtype=float), np.zeros(len(newer), dtype=np.int64))
    assert ranking_consistency(*given) == (agreement if agreement is None else pytest.approx(agreement))


def test_a_prompt_without_a_ranking_does_not_count():
    newer, older = np.array([1.0, 1.0, 1.0, 2.0]), np.array([3.0, 3.0, 1.0, 2.0])
    assert ranking_consistency(newer, older, np.array([7, 7, 2, 2])) == 1.0
