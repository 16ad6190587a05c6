"""The decision over simulated histories; the whole table: python -m tests.sera_core.method.histories."""

import numpy as np
import pytest

from sera_core.method.convergence import Rule
from tests.sera_core.method.histories import HISTORIES, SIZES, Size, correct_by_round, play, row

COPIES = 20
RULE = Rule(resamples=200)
DEMO, LARGE = list(SIZES.values())[:2]


def rows(name, size, copies=COPIES):
    history = HISTORIES[name]
    return row(history, [play(history, size, RULE, (9, copy)) for copy in range(copies)])


def test_the_simulated_pairs_have_the_levels_and_are_alike_between_rounds():
    correct, difference, groups = correct_by_round(
        (0.6, 0.7, 0.7), Size(200_000, 100_000), np.random.default_rng(0)
    )
    sides = [correct[:, difference == sign].mean(axis=1) for sign in (1, -1)]
    assert np.mean(sides, axis=0) == pytest.approx([0.6, 0.7, 0.7], abs=0.005)
    assert sides[0] - sides[1] == pytest.approx([0.1] * 3, abs=0.01)
    assert 0.4 < np.corrcoef(correct[1], correct[2])[0, 1] < 0.7
    assert len(np.unique(groups)) == 100_000


@pytest.mark.parametrize("name", ["improving by 0.03 a round", "one bad round, then recovery"])
def test_a_run_that_improves_is_not_stopped(name):
    """The whole table's target is 5 %; of 20 copies at most 3 may miss it."""
    assert rows(name, LARGE).stopped_early <= 0.15


@pytest.mark.parametrize("name", ["plateau, then drop of 0.10", "decline of 0.03 a round"])
def test_a_fall_is_found_in_time_at_the_larger_size(name):
    """The whole table's target is 90 %."""
    assert rows(name, LARGE).found >= 0.75


def test_at_the_larger_size_a_plateau_converges():
    assert rows("plateau after round 2", LARGE).converged >= 0.7


@pytest.mark.parametrize("name", list(HISTORIES))
def test_at_the_demos_size_nothing_ever_converges_for_lack_of_power(name):
    got = rows(name, DEMO, 10)
    assert got.converged == 0
    assert set(got.last) <= {"not_enough_evidence", "degrading", "improving"}
