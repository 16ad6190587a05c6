"""Win rates and calibration of a judge: values by hand, second formulas, controls."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sera_core.method.judged import (
    Judged,
    better_than,
    cohens_kappa,
    label_kappa,
    longer_preferred,
    order_flips,
    ties,
    wins,
    wins_at_equal_length,
)


def judged(given, swapped, lengths=None, groups=None) -> Judged:
    n = len(given)
    return Judged(
        np.array(given, dtype=float),
        np.array(swapped, dtype=float),
        np.array(lengths or [0] * n, dtype=float),
        np.arange(n) if groups is None else np.array(groups),
    )


def test_orders_that_disagree_are_a_tie():
    """Win, tie, loss, and three that differ: (1 + 0.5 + 0 + 3 · 0.5) / 6."""
    found = judged([1, 0.5, 0, 1, 0, 1], [1, 0.5, 0, 0, 1, 0.5])
    assert found.outcomes.tolist() == [1, 0.5, 0, 0.5, 0.5, 0.5]
    assert wins(found).value == 0.5
    assert ties(found).value == pytest.approx(4 / 6)
    assert order_flips(found).value == 0.5


def test_a_constant_judge_is_found_out():
    found = judged([1] * 40, [0] * 40, [3, -3] * 20)
    assert order_flips(found).value == 1.0 and order_flips(found).low > 0.9
    assert wins(found).value == 0.5 and ties(found).value == 1.0
    assert label_kappa(found).value == 0.0
    assert longer_preferred(found).value == 0.5


def test_a_word_count_prefers_the_longer_answer_always():
    """Lengths 2, −1, 0, 4: right, wrong, a tie, right. By place 4 right, 2 wrong, 2 ties of 8.

    p_o = 4/8; the judge calls each place better in 3/8, people in 4/8: p_e = 3/8; κ = (4/8 − 3/8)/(5/8).
    """
    found = judged([1, 0, 0.5, 1], [1, 0, 0.5, 1], [2, -1, 0, 4])
    assert longer_preferred(found).value == 1.0 and longer_preferred(found).n == 6
    assert wins(found).value == 2.5 / 4
    assert label_kappa(found).value == pytest.approx(0.2)


def test_kappa_of_cohen_by_hand():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5, κ = 0.4."""
    cells = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    first, second = (np.array(side) for side in zip(*cells, strict=True))
    found = cohens_kappa(first, second, seed=0)
    assert found.value == pytest.approx(0.4) and found.n == 50
    assert found.low < 0.4 < found.high
    # The large-sample standard error is sqrt(p_o (1 − p_o) / n) / (1 − p_e) = 0.1296.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1296, rel=0.15)


@given(st.tuples(*[st.integers(0, 20)] * 4).filter(lambda t: sum(t) > 0))
def test_kappa_of_two_categories_by_another_formula(counts):
    """κ = 2 (ad − bc) / ((a + b)(b + d) + (a + c)(c + d))."""
    a, b, c, d = counts
    first = np.array([0] * (a + b) + [1] * (c + d))
    second = np.array([0] * a + [1] * b + [0] * c + [1] * d)
    below = (a + b) * (b + d) + (a + c) * (c + d)
    found = cohens_kappa(first, second, seed=0, resamples=10).value
    assert math.isnan(found) if below == 0 else found == pytest.approx(2 * (a * d - b * c) / below)


def test_kappa_resamples_prompts():
    draw = np.random.default_rng(0)
    first = draw.integers(0, 2, 60)
    second = np.where(draw.random(60) < 0.7, first, 1 - first)
    alone = cohens_kappa(first, second, seed=0)
    repeated = cohens_kappa(
        np.repeat(first, 4), np.repeat(second, 4), seed=0, groups=np.repeat(np.arange(60), 4)
    )
    assert repeated.value == pytest.approx(alone.value)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert repeated.groups == 60


@pytest.mark.parametrize(("first", "second"), [([0, 1], [0]), ([0, -1], [0, 0])])
def test_kappa_refuses_what_is_not_aligned_or_not_rated(first, second):
    with pytest.raises(ValueError, match=r"align them by item|leave out items"):
        cohens_kappa(np.array(first), np.array(second), seed=0)


def test_kappa_without_items_or_chance():
    none = np.zeros(0, dtype=int)
    assert math.isnan(cohens_kappa(none, none, seed=0).value)
    assert math.isnan(cohens_kappa(np.zeros(3, dtype=int), np.zeros(3, dtype=int), seed=0).value)


def test_a_judge_of_length_alone_draws_at_equal_length():
    lengths = [*range(1, 31), *range(-10, 0)]
    outcome = [float(length > 0) for length in lengths]
    found = judged(outcome, outcome, lengths)
    assert wins(found).value == 0.75
    assert wins_at_equal_length(found).value == pytest.approx(0.5, abs=0.15)


def test_length_control_resamples_prompts():
    draw = np.random.default_rng(1)
    outcome, lengths = draw.integers(0, 2, 50).astype(float), draw.normal(size=50)
    alone = wins_at_equal_length(judged(outcome, outcome, list(lengths)))
    repeated = wins_at_equal_length(
        judged(
            np.repeat(outcome, 4), np.repeat(outcome, 4), list(np.repeat(lengths, 4)), np.repeat(range(50), 4)
        )
    )
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert repeated.groups == 50


def test_better_than_is_paired():
    one, other = (
        judged([1] * 30 + [0] * 10, [1] * 30 + [0] * 10),
        judged([1] * 20 + [0] * 20, [1] * 20 + [0] * 20),
    )
    found = better_than(one, other)
    assert found.value == 0.25 and found.low > 0
    assert better_than(one, one).low == 0.0
