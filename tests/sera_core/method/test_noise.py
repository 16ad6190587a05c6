import numpy as np
import pytest
from scipy.stats import studentized_range

from sera_core.method.noise import Noise, noise_floor, response_noise, studentised_range


@pytest.mark.parametrize(("count", "freedom"), [(2, 12), (8, 12), (16, 30), (4, 6)])
def test_the_quantile_is_the_studentised_ranges(count, freedom):
    assert studentised_range(count, freedom) == pytest.approx(
        studentized_range.ppf(0.95, count, freedom), rel=1e-4
    )


@pytest.mark.parametrize("responses", [2, 8])
def test_best_and_worst_of_pure_noise_stay_below_the_floor_in_95_of_100(responses):
    rng = np.random.default_rng(3)
    above = 0
    for _ in range(2000):
        measured = response_noise(rng.normal(0, 0.4, 12), np.zeros(12))
        rewards = rng.normal(0, 0.4, responses)
        above += np.ptp(rewards) > noise_floor(measured, responses)
    assert 0.035 < above / 2000 < 0.065


def test_the_noise_is_the_root_mean_square_error_of_finite_responses():
    # errors 3 and 4, the third is no number: sqrt((9 + 16) / 2)
    noise = response_noise(np.array([3.0, 5.0, np.inf]), np.array([0.0, 1.0, 0.0]))
    assert noise.sigma == pytest.approx(12.5**0.5) and noise == Noise(noise.sigma, 2)


def test_without_error_there_is_no_floor_and_one_response_makes_no_pair():
    assert noise_floor(response_noise(np.ones(4), np.ones(4)), 8) == 0.0
    with pytest.raises(ValueError, match="at least two responses"):
        noise_floor(Noise(0.1, 12), 1)
