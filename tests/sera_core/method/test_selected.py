import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sera_core.method.diagnostics import length_margin_correlation
from sera_core.method.selected import selected
from sera_core.method.win_rates import bootstrap_excess

light = settings(max_examples=30, deadline=None, derandomize=True)


def test_a_selection_by_hand():
    """3 of 6 have more; of the 4 kept 3 do: 3/4 − 1/2."""
    difference = np.array([2.0, 1, 3, -1, -2, 0])
    margins, kept = np.array([3.0, 2, 1, 4, -1, -2]), np.array([True, True, True, True, False, False])
    got = selected(difference, margins, kept, difference, seed=0, resamples=100)
    assert (got.before.more.value, got.after.more.value, got.excess.value) == (0.5, 0.75, 0.25)
    assert (got.before.more.pairs, got.after.more.pairs) == (6, 4)
    assert got.before.correlation.value == pytest.approx(stats.spearmanr(difference, margins).statistic)
    assert got.after.correlation.value == pytest.approx(
        stats.spearmanr(difference[:4], margins[:4]).statistic
    )
    assert got.after.after_length.value is None


@light
@given(st.integers(0, 2**31), st.integers(20, 80))
def test_it_agrees_with_the_diagnostics_it_stands_beside(seed, size):
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.integers(1, 50, size), rng.integers(1, 50, size)
    margins, kept, groups = rng.normal(size=size), rng.random(size) < 0.7, rng.integers(0, 30, size)
    difference = (chosen - rejected).astype(np.float64)
    got = selected(difference, margins, kept, difference, groups, seed=0, resamples=2000)
    excess = bootstrap_excess(kept, difference > 0, seed=0, groups=groups)
    assert got.excess.value == pytest.approx(excess.value)
    assert got.excess.low == pytest.approx(excess.low, abs=0.04)
    assert got.before.correlation.value == pytest.approx(length_margin_correlation(chosen, rejected, margins))


def test_a_selection_by_margin_takes_what_goes_along_with_the_margin():
    rng = np.random.default_rng(0)
    difference = rng.normal(size=1000)
    margins = difference + rng.normal(size=1000)
    got = selected(
        difference, margins, margins > np.median(margins), rng.normal(size=1000), seed=0, resamples=200
    )
    assert got.excess.low > 0.1
    assert got.after.correlation.value < got.before.correlation.value
    nothing = selected(difference, margins, np.zeros(1000, dtype=bool), difference, seed=0, resamples=20)
    assert nothing.after.more.value is nothing.excess.value is nothing.after.correlation.value is None
