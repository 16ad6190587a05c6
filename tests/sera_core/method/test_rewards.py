import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method import rewards

light = settings(max_examples=50, deadline=None, derandomize=True)
nats = st.floats(-500, 0)


def array(*values):
    return np.array(values, dtype=np.float64)


def test_the_implicit_reward_is_beta_times_the_log_ratio():
    """0.1 · (−10 − (−14)) = 0.4 and 0.1 · (−9 − (−8)) = −0.1."""
    got = rewards.implicit_reward(array(-10, -9), array(-14, -8), 0.1)
    np.testing.assert_allclose(got, [0.4, -0.1], atol=1e-15)


def test_the_margin_is_the_difference_of_log_ratios_without_beta():
    """[−10 − (−14)] − [−9 − (−8)] = 4 − (−1) = 5."""
    got = rewards.implicit_reward_margin(array(-10), array(-9), array(-14), array(-8))
    assert got.tolist() == [5.0]


@light
@given(st.lists(st.tuples(nats, nats, nats, nats), min_size=1, max_size=8), st.floats(0.01, 2))
def test_the_margin_is_the_rewards_difference_over_beta(rows, beta):
    policy_w, policy_l, ref_w, ref_l = np.array(rows, dtype=np.float64).T
    difference = rewards.implicit_reward(policy_w, ref_w, beta) - rewards.implicit_reward(
        policy_l, ref_l, beta
    )
    margin = rewards.implicit_reward_margin(policy_w, policy_l, ref_w, ref_l)
    np.testing.assert_allclose(margin, difference / beta, atol=1e-9)
    swapped = rewards.implicit_reward_margin(policy_l, policy_w, ref_l, ref_w)
    np.testing.assert_allclose(swapped, -margin, atol=1e-9)


@pytest.mark.parametrize(("kind", "expected"), [("implicit", 0.8), ("avg-implicit", 0.2), ("simpo", -0.4)])
def test_each_score_has_the_value_of_its_formula(kind, expected):
    """β = 0.2, log π = −8, log π_ref = −12, 4 tokens: 0.2·4 = 0.8; 0.8/4 = 0.2; 0.2·(−8)/4 = −0.4."""
    ref = None if kind == "simpo" else array(-12)
    got = rewards.score_responses(kind, array(-8), ref, np.array([4]), 0.2)
    np.testing.assert_allclose(got, [expected], atol=1e-15)


@pytest.mark.parametrize(
    ("kind", "ref", "tokens", "beta", "message"),
    [
        ("simpo", array(-12), 4, 0.1, "leave the reference out"),
        ("implicit", None, 4, 0.1, "ask for 'simpo'"),
        ("avg-implicit", None, 4, 0.1, "ask for 'simpo'"),
        ("avg-implicit", array(-12), 0, 0.1, "drop empty responses"),
        ("implicit", array(-12), 4, 0, "must be positive"),
        ("dpo", array(-12), 4, 0.1, "choose one of implicit"),
    ],
)
def test_a_score_that_cannot_be_is_refused_with_its_remedy(kind, ref, tokens, beta, message):
    with pytest.raises(ValueError, match=message):
        rewards.score_responses(kind, array(-8), ref, np.array([tokens]), beta)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("last-two", [0.75, 0.25]), ("mean", [0.75, 0.125, 0.125]), ("ema", [0.75, 0.1875, 0.0625])],
)
def test_ensemble_weights_are_those_of_three_rounds_by_hand(kind, expected):
    """γ = 1/4, three policies: ema is 3/4 r_2 + 1/4 (3/4 r_1 + 1/4 r_0)."""
    assert rewards.ensemble_weights(kind, 0.25, 3).tolist() == expected


@light
@given(st.sampled_from(rewards.ENSEMBLES), st.floats(0, 0.99), st.integers(1, 9))
def test_ensemble_weights_sum_to_one_and_name_no_policy_more_than_there_are(kind, gamma, rounds):
    weights = rewards.ensemble_weights(kind, gamma, rounds)
    assert weights.sum() == pytest.approx(1)
    assert 1 <= weights.size <= rounds
    assert weights[0] == pytest.approx(1 if rounds == 1 else 1 - gamma)


@pytest.mark.parametrize("kind", rewards.ENSEMBLES)
def test_without_a_past_only_the_current_policy_is_evaluated(kind):
    assert rewards.ensemble_weights(kind, 0, 5).tolist() == [1.0]
    assert rewards.ensemble_weights(kind, 0.3, 1).tolist() == [1.0]


@light
@given(st.lists(st.tuples(nats, nats, nats), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_the_unrolled_ema_equals_its_recursion(rows, gamma):
    newest, middle, oldest = np.array(rows, dtype=np.float64).T
    recursion = (1 - gamma) * newest + gamma * ((1 - gamma) * middle + gamma * oldest)
    got = rewards.ensemble_reward([newest, middle, oldest], rewards.ensemble_weights("ema", gamma, 3))
    np.testing.assert_allclose(got, recursion, atol=1e-9)


def test_the_newest_policy_has_the_first_weight():
    """0.75 · 4 + 0.25 · (−8) = 1."""
    assert rewards.ensemble_reward([array(4), array(-8)], array(0.75, 0.25)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("kind", "gamma", "rounds", "message"),
    [
        ("median", 0.3, 2, "choose one of"),
        ("ema", 1, 2, r"\[0, 1\)"),
        ("ema", -0.1, 2, r"\[0, 1\)"),
        ("ema", 0, 0, "rounds"),
    ],
)
def test_an_ensemble_that_cannot_be_is_refused(kind, gamma, rounds, message):
    with pytest.raises(ValueError, match=message):
        rewards.ensemble_weights(kind, gamma, rounds)


def test_an_ensemble_with_a_weight_too_many_is_refused():
    with pytest.raises(ValueError, match="2 weights but 1"):
        rewards.ensemble_reward([array(1)], array(0.5, 0.5))


def test_quantised_values_are_the_nearest_millionth_and_never_minus_zero():
    """0.12345649 → 0.123456, 0.12345651 → 0.123457, −1e−9 → 0 (not −0)."""
    got = rewards.quantise(array(0.12345649, 0.12345651, -1e-9, np.inf))
    assert got.tolist() == [0.123456, 0.123457, 0.0, np.inf]
    assert not np.signbit(got[2])
    assert rewards.quantise(array(1.6), 1.0).tolist() == [2]


@light
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20))
def test_quantising_twice_changes_nothing_and_moves_by_half_a_step_at_most(values):
    values = np.array(values, dtype=np.float64)
    once = rewards.quantise(values)
    assert np.array_equal(rewards.quantise(once), once)
    assert np.abs(once - values).max() <= 0.5e-6 + 1e-11


def test_a_step_that_does_not_divide_a_nat_is_refused():
    for step in (3e-6, 0.0, -1e-6, 2.0):
        with pytest.raises(ValueError, match="one over a whole number"):
            rewards.quantise(array(1), step)


def test_the_length_penalty_turns_the_longer_best_into_the_shorter_one():
    """One prompt: rewards 2 (30 tokens) and 1 (10 tokens).

    α = 0: the first is best, 30 − 10 = +20. α = 0.05: 0.5 and 0.5 tie, mean lengths are equal, 0.
    α = 0.1: −1 and 0, the second is best, −20. The third response alone in its group does not count.
    """
    args = array(2, 1, 5), np.array([30, 10, 99]), np.array([0, 0, 1])
    alphas = array(0, 0.0625, 0.1)
    assert rewards.length_penalty_sweep(*args, alphas).tolist() == [20, -20, -20]
    tied = array(2, 1, 5), np.array([24, 8, 99]), np.array([0, 0, 1])  # 2 − 24/16 = 1 − 8/16 exactly
    sweep = rewards.length_penalty_sweep(*tied, alphas)
    assert (rewards.nearest_zero(alphas, sweep), sweep.tolist()) == (0.0625, [16, 0, -16])


def test_equally_good_penalties_go_to_the_smallest():
    assert rewards.nearest_zero(array(-0.2, 0.1, -0.1), array(0, 0, 0)) == 0.1
    assert rewards.nearest_zero(array(-0.2, 0.1, -0.1), array(5, np.nan, -7)) == -0.2


@light
@given(st.integers(0, 10_000))
def test_a_larger_penalty_never_makes_the_best_longer(seed):
    rng = np.random.default_rng(seed)
    tokens, groups = rng.integers(1, 50, 40), rng.integers(0, 6, 40)
    values = rng.normal(size=40) + 0.05 * tokens
    grid = rewards.penalty_grid(values, tokens)
    sweep = rewards.length_penalty_sweep(values, tokens, groups, grid)
    assert (np.diff(sweep) <= 1e-9).all()
    assert grid.size == 41
    assert grid[20] == 0
    np.testing.assert_array_equal(grid, -grid[::-1])
    alpha = rewards.nearest_zero(grid, sweep)
    assert abs(sweep[grid == alpha]) == np.abs(sweep).min()


def test_the_grid_ends_at_twice_the_ratio_of_spreads():
    """std(reward) = 1, std(tokens) = 10: the ends are ±0.2; of equal lengths only 0 is tried."""
    assert rewards.penalty_grid(array(1, 3), np.array([10, 30]), 5).tolist() == [-0.2, -0.1, 0, 0.1, 0.2]
    assert rewards.penalty_grid(array(1, 3), np.array([10, 10])).tolist() == [0]
    with pytest.raises(ValueError, match="odd number"):
        rewards.penalty_grid(array(1, 3), np.array([10, 30]), 4)


def test_a_penalty_cannot_be_fitted_to_single_responses():
    with pytest.raises(ValueError, match="two responses"):
        rewards.length_penalty_sweep(array(1, 2), np.array([3, 4]), np.array([0, 1]), array(0))
