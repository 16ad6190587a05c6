"""Arms pooled over seeds: values by hand, and intervals that resample prompts."""

import numpy as np
import pytest

from sera_core.method.comparison import difference_from_first, values_of

SIGN = np.array([3.0, 1.0, -2.0, -1.0, 0.0])
FIRST = np.array([[1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.5, 0.0]])
"""Means over the two seeds: 1, ½ | ½, ¼ | ½: aligned ¾, counter ⅜, equal ½."""
ARM = np.array([[1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.5, 0.0]])
"""Means: 1, 0 | 1, ¾ | 0: aligned ½, counter ⅞, equal 0."""


def test_values_are_means_over_seeds_by_hand():
    """Accuracy (1 + ½ + ½ + ¼ + ½) / 5 = .55; balanced (¾ + ⅜) / 2 = .5625; reliance ¾ − ⅜ = .375."""
    expected = {"aligned": 0.75, "counter": 0.375, "equal": 0.5}
    expected |= {"accuracy": 0.55, "balanced": 0.5625, "reliance": 0.375}
    assert values_of(FIRST, SIGN) == pytest.approx(expected)
    one_by_one = [values_of(FIRST[[seed]], SIGN) for seed in (0, 1)]
    for name, value in expected.items():
        assert np.mean([values[name] for values in one_by_one]) == pytest.approx(value)


def test_a_side_without_pairs_leaves_its_values_open():
    found = values_of(FIRST[:, :2], SIGN[:2])
    assert found["aligned"] == 0.75 and found["accuracy"] == 0.75
    assert {found[name] for name in ("counter", "equal", "balanced", "reliance")} == {None}


def test_the_difference_is_the_arm_less_the_first_by_hand():
    """Balanced (½ + ⅞) / 2 − .5625 = .125; reliance (½ − ⅞) − .375 = −.75."""
    found = difference_from_first(ARM, FIRST, SIGN, np.arange(5), seed=0)
    assert found.balanced.value == pytest.approx(0.125)
    assert found.reliance.value == pytest.approx(-0.75)
    assert (found.balanced.pairs, found.balanced.prompts) == (4, 4)  # the equal pair says nothing here
    assert difference_from_first(ARM, FIRST, SIGN, np.arange(5), seed=0) == found


def test_an_arm_that_ranks_as_the_first_is_not_distinguishable_whatever_its_seeds():
    """The seeds differ, their means do not: every resample's difference is 0."""
    found = difference_from_first(FIRST[::-1].copy(), FIRST, SIGN, np.arange(5), seed=0)
    assert (found.balanced.value, found.balanced.low, found.balanced.high) == (0.0, 0.0, 0.0)
    assert not found.distinguishable


def test_prompts_are_resampled_and_not_pairs_or_seeds():
    """Each pair and each seed four times over is no more evidence: the prompts are the same 60."""
    rng = np.random.default_rng(0)
    sign, groups = rng.choice([-1.0, 1.0], 60), np.arange(60)
    first, arm = (rng.integers(0, 2, (1, 60)).astype(float) for _ in range(2))
    once = difference_from_first(arm, first, sign, groups, seed=1)
    again = difference_from_first(
        *(np.tile(np.repeat(correct, 4, axis=1), (4, 1)) for correct in (arm, first)),
        np.repeat(sign, 4),
        np.repeat(groups, 4),
        seed=1,
    )
    assert again.balanced.low == pytest.approx(once.balanced.low)
    assert again.balanced.high == pytest.approx(once.balanced.high)


def test_a_clear_difference_is_told_apart():
    """The arm is right on nine of ten pairs of each side where the first is wrong on all."""
    sign = np.tile([1.0, -1.0], 50)
    arm = (np.arange(100) % 20 > 1).astype(float)[None]
    found = difference_from_first(arm, np.zeros((1, 100)), sign, np.arange(100), seed=0)
    assert found.balanced.value == pytest.approx(0.9) and found.balanced.low > 0.8
    assert found.distinguishable


@pytest.mark.parametrize(
    ("correct", "said"), [(np.zeros((0, 5)), "at least one seed"), (np.full((1, 5), np.nan), "not finite")]
)
def test_what_cannot_be_pooled_is_refused(correct, said):
    with pytest.raises(ValueError, match=said):
        values_of(correct, SIGN)
