"""Many arms from pairwise comparisons: against closed forms, another optimiser, and planted strengths."""

import numpy as np
import pytest
import torch

from sera_core.method.bradley_terry import RIDGE, strengths
from sera_core.method.win_rates import length_controlled_win_rate


def drawn(theta, count, seed=0, phi=0.0):
    """Comparisons of random pairs of arms with planted strengths and an effect of style."""
    rng = np.random.default_rng(seed)
    first = rng.integers(len(theta), size=count)
    second = (first + rng.integers(1, len(theta), size=count)) % len(theta)
    style = rng.normal(0, 1, count) + 1.5 * (np.asarray(theta)[first] - np.asarray(theta)[second])
    logit = np.asarray(theta)[first] - np.asarray(theta)[second] + phi * np.tanh(style / style.std())
    outcomes = (rng.random(count) < 1 / (1 + np.exp(-logit))).astype(float)
    return first, second, outcomes, style[:, None], rng.integers(count // 4, size=count)


def test_two_arms_have_their_win_rate():
    outcomes = np.array([1.0] * 60 + [0.5] * 10 + [0.0] * 30)
    ones, zeros = np.ones(100, dtype=int), np.zeros(100, dtype=int)
    base, other = strengths(ones, zeros, outcomes, 2, groups=np.arange(100), seed=0, resamples=500)
    assert (base.value, base.low, base.high) == (0.5, 0.5, 0.5)
    assert other.value == pytest.approx(0.65, abs=1e-3) and other.low < 0.65 < other.high
    turned = strengths(zeros, ones, 1 - outcomes, 2, groups=np.arange(100), seed=0, resamples=500)
    assert turned[1].value == pytest.approx(other.value, abs=1e-12)


def test_two_arms_and_one_feature_are_the_length_controlled_win_rate():
    first, _, outcomes, style, groups = drawn([0.0, 0.7], 300, phi=1.0)
    outcomes, style = (
        np.where(first == 1, outcomes, 1 - outcomes),
        np.where(first == 1, style[:, 0], -style[:, 0]),
    )
    ones, zeros = np.ones(300, dtype=int), np.zeros(300, dtype=int)
    found = strengths(ones, zeros, outcomes, 2, style[:, None], groups=groups, seed=3, resamples=400)[1]
    again = length_controlled_win_rate(outcomes, style, seed=3, resamples=400, groups=groups)
    assert found.value == pytest.approx(again.value, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((again.low, again.high), abs=0.02)


def test_the_fit_is_that_of_another_optimiser():
    first, second, outcomes, style, groups = drawn([0.0, 0.5, -0.4, 1.2], 400, phi=0.8)
    found = strengths(first, second, outcomes, 4, style, groups=groups, seed=0, resamples=10)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    phi = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(np.tanh(style[:, 0] / style.std()))
    optimiser = torch.optim.LBFGS(
        [theta, phi], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        logit = theta[first] - theta[second] + phi * x
        fit = torch.nn.functional.binary_cross_entropy_with_logits(
            logit, torch.tensor(outcomes), reduction="sum"
        )
        value = fit + RIDGE / 2 * ((theta[1:] - theta[0]) ** 2).sum() + RIDGE / 2 * (phi**2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    expected = torch.sigmoid(theta - theta[0]).detach().numpy()
    np.testing.assert_allclose([rate.value for rate in found], expected, atol=1e-6)


def test_style_control_takes_out_what_style_alone_wins():
    """Arms that differ only in style: without control the longer-winded one seems better."""
    rng = np.random.default_rng(1)
    first, second = np.tile([1, 0], 1000), np.tile([0, 1], 1000)
    style = np.where(first == 1, 1.0, -1.0) + rng.normal(0, 1, 2000)
    outcomes = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(style / style.std())))).astype(float)
    groups = np.arange(2000)
    plain = strengths(first, second, outcomes, 2, groups=groups, seed=0, resamples=300)[1]
    controlled = strengths(first, second, outcomes, 2, style[:, None], groups=groups, seed=0, resamples=300)[
        1
    ]
    assert plain.low > 0.6 and controlled.low < 0.5 < controlled.high


def test_the_intervals_cover_the_planted_strengths():
    theta = [0.0, 0.6, -0.5]
    covered = []
    for seed in range(40):
        first, second, outcomes, _, groups = drawn(theta, 240, seed)
        found = strengths(first, second, outcomes, 3, groups=groups, seed=0, resamples=200)
        true = 1 / (1 + np.exp(-np.array(theta)))
        covered += [rate.low <= value <= rate.high for rate, value in zip(found[1:], true[1:], strict=True)]
    assert 0.85 <= np.mean(covered) <= 1.0


def test_an_arm_that_always_wins_is_finite_and_no_comparison_says_nothing():
    ones, zeros = np.ones(5, dtype=int), np.zeros(5, dtype=int)
    found = strengths(ones, zeros, np.ones(5), 2, groups=np.arange(5), seed=0, resamples=50)
    assert 0.9 < found[1].value < 1
    none = np.zeros(0, dtype=int)
    assert np.isnan(strengths(none, none, np.zeros(0), 2, groups=none, seed=0)[1].value)
    one = strengths(ones, zeros, np.ones(5), 2, groups=zeros, seed=0)
    assert one[1].groups == 1 and np.isnan(one[1].low)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first": np.array([0, 1, 3])}, "two different arms, 0 to 2"),
        ({"second": np.array([0, 2, 2])}, "two different arms"),
        ({"outcomes": np.array([1.0, 0.3, 0.0])}, "an outcome is"),
        ({"groups": np.arange(2)}, "give one each"),
        ({"style": np.array([[0.0], [np.inf], [1.0]])}, "not finite"),
    ],
)
def test_what_is_no_comparison_is_refused(change, said):
    given = {
        "first": np.array([1, 2, 1]),
        "second": np.array([0, 1, 2]),
        "outcomes": np.array([1.0, 0.5, 0.0]),
        "arms": 3,
        "style": np.zeros((3, 1)),
        "groups": np.arange(3),
    } | change
    with pytest.raises(ValueError, match=said):
        strengths(**given, seed=0)
