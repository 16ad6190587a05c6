import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method import win_rates

light = settings(max_examples=40, deadline=None, derandomize=True)


def array(*values):
    return np.array(values, dtype=np.float64)


def test_wilsons_interval_of_eight_in_ten_is_the_known_one():
    """p = 0.8, z = 1.95996, z² = 3.8415: centre (0.8 + 0.19207)/1.38415 = 0.71674.

    Half width 1.95996 · √(0.016 + 0.0096)/1.38415 = 0.22659: [0.4902, 0.9433], as in the tables.
    """
    got = win_rates.wilson_interval(8, 10)
    assert (got.value, got.n) == (0.8, 10)
    assert (got.low, got.high) == (pytest.approx(0.4902, abs=5e-5), pytest.approx(0.9433, abs=5e-5))


@light
@given(st.integers(1, 500), st.floats(0, 1))
def test_wilsons_interval_holds_the_rate_and_mirrors_with_the_losses(n, share):
    wins = int(share * n)
    got, mirrored = win_rates.wilson_interval(wins, n), win_rates.wilson_interval(n - wins, n)
    assert 0 <= got.low <= got.value <= got.high <= 1
    assert got.low < got.high
    assert (mirrored.low, mirrored.high) == (pytest.approx(1 - got.high), pytest.approx(1 - got.low))


def test_a_tie_is_half_a_win():
    """(1 + 0.5 + 0 + 1)/4 = 0.625."""
    got = win_rates.win_rate(array(1, 0.5, 0, 1))
    assert (got.value, got.n) == (0.625, 4)
    assert got == win_rates.wilson_interval(2.5, 4)


def test_a_judge_that_goes_by_position_has_no_agreement():
    assert win_rates.order_swap_agreement(array(1, 1, 1), array(0, 0, 0)).value == 0
    assert win_rates.order_swap_agreement(array(1, 0.5, 0, 1), array(1, 0.5, 1, 1)).value == 0.75


def test_nothing_to_count_gives_a_rate_of_nan_and_never_zero():
    empty = np.zeros(0)
    for rate in (
        win_rates.win_rate(empty),
        win_rates.order_swap_agreement(empty, empty),
        win_rates.bootstrap_interval(empty, seed=0),
        win_rates.bootstrap_difference(empty, empty, seed=0),
        win_rates.bootstrap_difference(empty, array(1), seed=0, paired=False),
        win_rates.length_controlled_win_rate(empty, empty, seed=0),
        win_rates.bootstrap_excess(np.zeros(3, dtype=bool), np.ones(3, dtype=bool), seed=0),
    ):
        assert rate.n == 0
        assert math.isnan(rate.value)
        assert math.isnan(rate.low)


def test_a_single_value_has_a_mean_but_no_interval():
    for rate in (
        win_rates.bootstrap_interval(array(3), seed=0),
        win_rates.bootstrap_difference(array(4), array(1), seed=0),
        win_rates.bootstrap_difference(array(4), array(1), seed=0, paired=False),
    ):
        assert (rate.value, rate.n) == (3, 1)
        assert math.isnan(rate.low)
        assert math.isnan(rate.high)


def test_the_bootstrap_interval_is_near_the_normal_one_for_many_values():
    """400 values, half 0, half 1: standard error 0.5/√400 = 0.025, 0.5 ± 1.96 · 0.025 = [0.451, 0.549]."""
    got = win_rates.bootstrap_interval(np.tile([0.0, 1.0], 200), seed=0)
    assert got.value == 0.5
    assert (got.low, got.high) == (pytest.approx(0.451, abs=0.005), pytest.approx(0.549, abs=0.005))


def test_the_bootstrap_gives_the_same_interval_for_the_same_seed_in_any_chunking(monkeypatch):
    values = np.arange(30.0)
    whole = win_rates.bootstrap_interval(values, seed=1)
    assert whole == win_rates.bootstrap_interval(values, seed=1)
    assert whole != win_rates.bootstrap_interval(values, seed=2)
    monkeypatch.setattr(win_rates, "_CELLS", 70)
    assert whole == win_rates.bootstrap_interval(values, seed=1)


def test_a_paired_difference_is_sharper_than_an_unpaired_one_and_has_the_sign_of_a():
    rng = np.random.default_rng(0)
    common = rng.normal(size=200)
    a, b = common + 0.5 + 0.01 * rng.normal(size=200), common
    paired = win_rates.bootstrap_difference(a, b, seed=0)
    loose = win_rates.bootstrap_difference(a, b, seed=0, paired=False)
    assert paired.value == pytest.approx(loose.value)
    assert paired.value == pytest.approx(0.5, abs=0.01)
    assert paired.high - paired.low < 0.1 * (loose.high - loose.low)
    assert loose.low < loose.value < loose.high


def test_the_excess_of_a_part_is_its_share_less_the_wholes():
    """Part: 3 hits of 4; whole: 4 hits of 10: 0.75 − 0.4 = 0.35."""
    part = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    hit = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], dtype=bool)
    got = win_rates.bootstrap_excess(part, hit, seed=0)
    assert (got.value, got.n) == (pytest.approx(0.35), 4)
    assert got.low < got.value < got.high
    many = win_rates.bootstrap_excess(np.tile(part, 100), np.tile(hit, 100), seed=0)
    # The spread of mean(hit|part) − mean(hit) over rows resampled as such, the slow way.
    rng, rows = np.random.default_rng(1), np.arange(1000)
    slow = []
    for _ in range(800):
        pick = rng.choice(rows, 1000)
        p, h = np.tile(part, 100)[pick], np.tile(hit, 100)[pick]
        slow.append(h[p].mean() - h.mean())
    assert (many.low, many.high) == tuple(
        pytest.approx(q, abs=0.006) for q in np.quantile(slow, [0.025, 0.975])
    )


def test_the_length_controlled_rate_is_that_of_equally_long_answers():
    """30 answers longer by 1 token win 27 times, 10 shorter by 1 win 5 times: raw 32/40 = 0.8.

    x = ±c, so logit(0.9) = θ + φc and logit(0.5) = θ − φc: θ = (ln 9 + 0)/2 = ln 3, σ(ln 3) = 0.75.
    """
    length = np.repeat([1, -1], [30, 10])
    outcomes = np.concatenate([np.repeat([1.0, 0.0], [27, 3]), np.repeat([1.0, 0.0], [5, 5])])
    got = win_rates.length_controlled_win_rate(outcomes, length, seed=0)
    assert win_rates.win_rate(outcomes).value == 0.8
    assert got.value == pytest.approx(0.75, abs=1e-3)
    assert got.low < got.value < got.high
    assert got.n == 40


def test_without_any_difference_of_length_the_rate_is_the_raw_one():
    """Also where the policy always wins: the ridge keeps the fit finite, just below 1."""
    outcomes = array(1, 1, 1, 0)
    assert win_rates.length_controlled_win_rate(outcomes, np.zeros(4), seed=0).value == pytest.approx(
        0.75, abs=4e-3
    )
    always = win_rates.length_controlled_win_rate(np.ones(50), np.arange(50), seed=0)
    assert 0.95 < always.low <= always.high < 1


@light
@given(st.integers(0, 1000))
def test_the_length_controlled_rate_mirrors_when_the_two_policies_change_places(seed):
    rng = np.random.default_rng(seed)
    outcomes, length = rng.choice([0, 0.5, 1], 25), rng.normal(size=25) * 40
    straight = win_rates.length_controlled_win_rate(outcomes, length, seed=0, resamples=20)
    mirrored = win_rates.length_controlled_win_rate(1 - outcomes, -length, seed=0, resamples=20)
    assert mirrored.value == pytest.approx(1 - straight.value, abs=1e-6)
    assert mirrored.low == pytest.approx(1 - straight.high, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rates.win_rate(array(0.7)), "leave failed judgements out"),
        (lambda: win_rates.order_swap_agreement(array(1), array(1, 0)), "both ways"),
        (lambda: win_rates.wilson_interval(3, 2), "count each observation once"),
        (lambda: win_rates.wilson_interval(1, 2, 95.0), "between 0 and 1"),
        (lambda: win_rates.bootstrap_interval(array(1, np.nan), seed=0), "leave them out"),
        (lambda: win_rates.bootstrap_interval(array(1, 2), seed=0, resamples=0), "at least one resample"),
        (lambda: win_rates.bootstrap_difference(array(1), array(1, 2), seed=0), "paired=False"),
        (lambda: win_rates.length_controlled_win_rate(array(1), array(1, 2), seed=0), "length differences"),
    ],
)
def test_a_count_that_cannot_be_is_refused_with_its_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
