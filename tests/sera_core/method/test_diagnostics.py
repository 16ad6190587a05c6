import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method import diagnostics

light = settings(max_examples=50, deadline=None, derandomize=True)
samples = st.lists(st.floats(-5, 5), min_size=1, max_size=15).map(lambda x: np.array(x, dtype=np.float64))


def array(*values):
    return np.array(values, dtype=np.float64)


def test_a_tie_is_half_a_correct_ranking():
    """+2 right, −1 wrong, 0 a half, +0.1 right: 2.5/4."""
    assert diagnostics.correctness(array(2, -1, 0, 0.1)).tolist() == [1, 0, 0.5, 1]
    assert diagnostics.reward_accuracy(array(2, -1, 0, 0.1)) == 0.625
    assert math.isnan(diagnostics.reward_accuracy(array()))
    with pytest.raises(ValueError, match="non_finite"):
        diagnostics.correctness(array(1, np.nan))


def test_quantiles_are_interpolated_and_ascend():
    assert diagnostics.quantiles(array(0, 10, 20), (0.25, 0.5, 1.0)).tolist() == [5, 10, 20]
    assert np.isnan(diagnostics.quantiles(array())).all()


def test_the_ks_distance_is_the_largest_gap_of_the_distribution_functions():
    """At 2, three quarters of a = (1, 2, 2, 5) lie at or below and none of b = (3, 4): 0.75."""
    assert diagnostics.ks_distance(array(1, 2, 2, 5), array(3, 4)) == 0.75
    assert diagnostics.ks_distance(array(1, 2), array(3, 4)) == 1
    with pytest.raises(ValueError, match="both must have some"):
        diagnostics.ks_distance(array(), array(1))


@light
@given(samples, samples)
def test_the_ks_distance_is_symmetric_and_zero_to_itself(a, b):
    distance = diagnostics.ks_distance(a, b)
    assert distance == diagnostics.ks_distance(b, a)
    assert 0 <= distance <= 1
    assert diagnostics.ks_distance(a, a) == 0


def test_sign_changes_count_to_and_from_zero():
    assert diagnostics.sign_changes(array(1, -1, 0, 2), array(2, 1, 0, 0)) == 0.5


def test_jaccard_is_the_common_over_the_joint():
    assert diagnostics.jaccard(["a", "b", "c"], {"b", "c", "d"}) == 0.5
    assert diagnostics.jaccard([], []) == 1
    assert diagnostics.jaccard(["a"], []) == 0


def test_both_kl_estimates_have_their_values_by_hand():
    """d = ln 2 and −ln 2: plain 0; k3 = (1/2 − 1 + ln 2 + 2 − 1 − ln 2)/2 = 1/4."""
    got = diagnostics.kl_estimate(array(-1, -1), array(-1, -1) - array(math.log(2), -math.log(2)))
    assert got.plain == pytest.approx(0)
    assert got.non_negative == pytest.approx(0.25)
    assert got.n == 2
    assert diagnostics.kl_estimate(array(-1), array(-4)).plain == 3
    assert math.isnan(diagnostics.kl_estimate(array(), array()).plain)


@light
@given(samples)
def test_the_second_kl_estimate_is_never_negative(d):
    assert diagnostics.kl_estimate(d, np.zeros_like(d)).non_negative >= -1e-12


def test_the_kl_estimates_agree_with_the_exact_divergence():
    """π = (0.7, 0.3), reference (0.5, 0.5): KL = 0.7 ln 1.4 + 0.3 ln 0.6 = 0.08228; exact proportions."""
    policy, ref = np.log(np.repeat([0.7, 0.3], [70, 30])), np.log(np.full(100, 0.5))
    got = diagnostics.kl_estimate(policy, ref)
    assert got.plain == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(0.6))
    assert got.non_negative == pytest.approx(got.plain)


def test_distinct_n_counts_each_n_gram_once():
    """1 2 1 2 has the bigrams 12, 21, 12; 1 2 has 12: two distinct of four."""
    assert diagnostics.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 0.5
    assert diagnostics.distinct_n([np.array([1, 1, 2])], 1) == pytest.approx(2 / 3)
    assert math.isnan(diagnostics.distinct_n([[1]], 2))
    with pytest.raises(ValueError, match="at least one token"):
        diagnostics.distinct_n([[1]], 0)


def test_self_overlap_is_the_mean_over_prompts_of_the_mean_over_pairs():
    """Prompt 1: {12, 23} and {12, 24} share 1 of 3. Prompt 2: twice the same and another: (1 + 0 + 0)/3.

    Prompt 3 has one response. (1/3 + 1/3)/2 = 1/3; the response of one token has no bigram: not counted.
    Without the third prompt and with two equal ones instead it is (1/3 + 1/3 + 1)/3 = 5/9.
    """
    groups = [[[1, 2, 3], [1, 2, 4]], [[5, 6, 7], [5, 6, 7], [9], [8, 9]], [[1, 2, 3]]]
    assert diagnostics.self_overlap(groups, 2) == pytest.approx(1 / 3)
    assert diagnostics.self_overlap([*groups[:2], [[1, 2], [1, 2]]], 2) == pytest.approx(5 / 9)
    assert math.isnan(diagnostics.self_overlap([[[1, 2, 3]]], 2))


def test_the_longer_share_counts_equal_lengths_as_a_half():
    """Longer, shorter, equal, longer: 2.5/4."""
    got = diagnostics.longer_share(np.array([5, 2, 3, 9]), np.array([4, 6, 3, 1]))
    assert (got.value, got.n) == (0.625, 4)
    assert got.low < 0.625 < got.high


def test_the_length_margin_correlation_is_spearmans_with_shared_ranks():
    """Length differences 1, 2, 2, 3 have ranks 1, 2.5, 2.5, 4; margins 1, 2, 4, 3 have 1, 2, 4, 3.

    Deviations −1.5, 0, 0, 1.5 and −1.5, −0.5, 1.5, 0.5: Σ = 3, 3/√(4.5 · 5) = 0.63246.
    """
    chosen, rejected = np.array([2, 3, 3, 4]), np.array([1, 1, 1, 1])
    got = diagnostics.length_margin_correlation(chosen, rejected, array(1, 2, 4, 3))
    assert got == pytest.approx(3 / math.sqrt(22.5))
    assert diagnostics.length_margin_correlation(rejected, chosen, array(1, 2, 4, 3)) == pytest.approx(-got)
    assert math.isnan(diagnostics.length_margin_correlation(rejected, rejected, array(1, 2, 4, 3)))


@light
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=3, max_size=20, unique=True))
def test_any_rising_function_of_the_length_difference_correlates_fully(rows):
    chosen, rejected = np.array(rows).T
    difference = (chosen - rejected).astype(np.float64)
    got = diagnostics.length_margin_correlation(chosen, rejected, np.exp(difference / 20))
    assert math.isnan(got) if np.ptp(difference) == 0 else got == pytest.approx(1)


def alarm(counter_now=0.5, counter_before=0.9, aligned_now=0.9, aligned_before=0.9, kept_more=0.9, n=200):
    """n held-out pairs a side, n train pairs, half with "chosen has more"; half kept, kept_more so."""

    def correct(share):
        return (np.arange(n) < share * n).astype(np.float64)

    more = np.arange(n) % 2 == 0
    wanted = np.round(kept_more * n / 2)
    kept = np.where(more, np.cumsum(more) <= wanted, np.cumsum(~more) <= n / 2 - wanted)
    return diagnostics.amplification_alarm(
        heldout_feature=np.repeat([-3, 4, 0], [n, n, 10]),
        correct_now=np.concatenate([correct(counter_now), correct(aligned_now), np.zeros(10)]),
        correct_before=np.concatenate([correct(counter_before), correct(aligned_before), np.ones(10)]),
        train_feature=np.where(more, 2.0, -1.0),
        kept=kept,
        comparison="random",
        seed=0,
    )


def test_the_alarm_is_raised_when_the_side_without_the_feature_falls_and_the_selection_leans_to_it():
    """0.5 − 0.9 = −0.4 on the counter side, 0 on the other, kept share 0.9 against 0.5: +0.4."""
    got = alarm()
    assert got.raised
    assert (got.reason, got.comparison) == ("amplified", "random")
    assert got.counter_change.value == pytest.approx(-0.4)
    assert (
        got.counter_change.n == got.aligned_change.n == 200
    )  # pairs with equal features are on neither side
    assert got.aligned_change.value == 0
    assert got.kept_share_excess.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"counter_now": 0.9}, "counter_side_holds"),
        ({"counter_now": 1.0}, "counter_side_holds"),
        ({"aligned_now": 0.6}, "both_sides_fall"),
        ({"kept_more": 0.5}, "selection_not_skewed"),
        ({"kept_more": 0.1}, "selection_not_skewed"),
        ({"n": 20}, "not_enough_evidence"),
    ],
)
def test_the_alarm_is_silent_when_one_of_its_conditions_does_not_hold(how, reason):
    got = alarm(**how)
    assert (got.raised, got.reason) == (False, reason)


def test_the_alarm_is_raised_too_when_the_other_side_gains():
    assert alarm(aligned_now=1.0).raised


def test_the_alarm_without_train_pairs_has_not_enough_evidence():
    got = diagnostics.amplification_alarm(
        heldout_feature=np.repeat([-1.0, 1.0], 50), correct_now=np.zeros(100), correct_before=np.ones(100),
        train_feature=np.zeros(0), kept=np.zeros(0, dtype=bool), comparison="head", seed=0,
    )  # fmt: skip
    assert got.reason == "not_enough_evidence"
