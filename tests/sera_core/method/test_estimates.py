import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method import estimates
from sera_core.method.estimates import Estimate, Resampled, estimate, simultaneous
from sera_core.method.win_rates import bootstrap_interval, wilson_interval

light = settings(max_examples=40, deadline=None, derandomize=True)


def columns_of(values):
    return np.stack([values, np.ones_like(values)], axis=1)


def mean(sums):
    return estimates.ratio(sums[:, 0], sums[:, 1])


def estimated(values, groups=None, level=0.95, seed=0, resamples=2000):
    prompts = estimates.prompts_in(groups, np.ones(len(values), dtype=bool))
    sample = Resampled(columns_of(values), groups, seed, resamples)
    return estimate(sample, mean, pairs=len(values), prompts=prompts, level=level)


def test_the_interval_of_a_share_is_near_wilsons():
    """300 of 400: p = .75, standard error √(.75 · .25 / 400) = .02165; Wilson's interval is [.705, .790]."""
    values = (np.arange(400) < 300).astype(np.float64)
    got, wilson = estimated(values, resamples=20_000), wilson_interval(300, 400)
    assert got.value == 0.75
    assert (got.low, got.high) == (
        pytest.approx(wilson.low, abs=0.006),
        pytest.approx(wilson.high, abs=0.006),
    )


def test_the_interval_is_that_of_the_bootstrap_written_out():
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=120), rng.integers(0, 40, 120)
    got = estimated(values, groups, resamples=4000)
    draws = []
    kinds = np.unique(groups)
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.choice(kinds, len(kinds))])
        draws.append(values[rows].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (got.low, got.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    older = bootstrap_interval(values, seed=3, groups=groups, resamples=4000)
    assert (got.low, got.high) == (pytest.approx(older.low, abs=0.03), pytest.approx(older.high, abs=0.03))


def test_pairs_of_one_prompt_that_move_together_widen_the_interval():
    once = np.random.default_rng(0).normal(size=100)
    single = estimated(once)
    repeated = estimated(np.repeat(once, 4), np.repeat(np.arange(100), 4))
    assert (repeated.low, repeated.high) == (pytest.approx(single.low), pytest.approx(single.high))
    assert (repeated.pairs, repeated.prompts) == (400, 100)


@light
@given(st.integers(0, 2**31), st.integers(2, 50))
def test_the_numbers_of_groups_and_the_order_of_pairs_do_not_matter(seed, size):
    rng = np.random.default_rng(seed)
    values, groups = rng.normal(size=size), rng.integers(0, 10, size)
    order = rng.permutation(size)
    one, other = (
        estimated(values, groups, resamples=50),
        estimated(values[order], groups[order], resamples=50),
    )
    assert other.value == pytest.approx(one.value)
    assert other.low == (None if one.low is None else pytest.approx(one.low))
    assert estimated(values, groups, resamples=50) == one


def test_weights_too_many_to_hold_are_drawn_in_pieces(monkeypatch):
    sums = np.ones((50, 1))
    monkeypatch.setattr(estimates, "_CELLS", 120)
    pieces = Resampled(sums, None, 0, 11).draws
    assert pieces[:, 0].tolist() == [50.0] * 11


def shifted(offsets, n=400, seed=0):
    """Quantities with the given means that share most of their noise."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    values = [offset + common + 0.3 * rng.normal(size=n) for offset in offsets]
    columns = np.stack([*values, np.ones(n)], axis=1)
    quantities = {str(k): (lambda s, k=k: s[:, k] / s[:, -1]) for k in range(len(offsets))}
    return columns, quantities


def test_simultaneous_intervals_lie_between_single_and_bonferronis_ones():
    columns, quantities = shifted([0.0, 0.1, 0.2])
    sample, how = Resampled(columns, None, 0, 4000), {"pairs": 400, "prompts": 400}
    together = simultaneous(sample, quantities, **how)
    alone = simultaneous(sample, {"0": quantities["0"]}, **how)["0"]
    bonferroni = simultaneous(sample, {"0": quantities["0"]}, level=1 - 0.05 / 3, **how)["0"]
    assert alone.high < together["0"].high < bonferroni.high
    assert together["2"].value == pytest.approx(columns[:, 2].mean())


def test_simultaneous_intervals_all_cover_in_about_95_of_100_samples():
    covered = 0
    for seed in range(300):
        columns, quantities = shifted([0.0, 0.1, 0.2], n=150, seed=seed)
        found = simultaneous(Resampled(columns, None, 0, 500), quantities, pairs=150, prompts=150)
        covered += all(
            e.low <= offset <= e.high for e, offset in zip(found.values(), [0, 0.1, 0.2], strict=True)
        )
    assert 0.91 <= covered / 300 <= 0.985


def test_a_quantity_that_nothing_moves_has_no_width_and_one_without_pairs_no_value():
    quantities = {"same": mean, "none": lambda s: np.full(len(s), np.nan)}
    found = simultaneous(Resampled(np.ones((10, 2)), None, 0), quantities, pairs=10, prompts=10)
    assert found["same"] == Estimate(1.0, 1.0, 1.0, 10, 10)
    assert found["none"] == Estimate(None, None, None, 10, 10)
    assert not found["none"].measurable


def test_a_single_prompt_has_a_value_but_no_interval():
    assert estimated(np.array([1.0, 0.0]), np.array([7, 7])) == Estimate(0.5, None, None, 2, 1)
    assert estimated(np.zeros(0)) == Estimate(None, None, None, 0, 0)


def test_an_estimate_is_said_in_words():
    assert Estimate(-0.1, -0.2, 0.01, 60, 50).in_words(signed=True) == "-0.100 [-0.200, +0.010] on 60 pairs"
    assert Estimate(0.5, None, None, 1, 1).in_words() == "0.500 on 1 pairs"
    assert Estimate(None, None, None, 0, 0).in_words() == "not measurable on 0 pairs"
    assert np.isnan(Estimate(None, None, None, 0, 0).rate.low)


@pytest.mark.parametrize("how", [{"level": 1.0}, {"level": 0.0}, {"resamples": 1}])
def test_a_level_or_a_number_of_resamples_that_cannot_be_is_refused(how):
    with pytest.raises(ValueError, match="interval"):
        estimated(np.zeros(3), **how)
