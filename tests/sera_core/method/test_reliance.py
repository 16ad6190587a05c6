import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sera_core.method.correlation import partial_rank_correlation, rank_correlation
from sera_core.method.estimates import check_finite
from sera_core.method.reliance import reliance, reliance_changes
from sera_core.method.sides import QUANTITIES, sides_of

light = settings(max_examples=60, deadline=None, derandomize=True)
QUICK = {"seed": 0, "resamples": 50}


def array(*values):
    return np.array(values, dtype=np.float64)


def values_of(found):
    return {name: estimate.value for name, estimate in found.accuracies.items()}


def test_reliance_by_hand():
    """d: + + + + − − 0; margins: + + + − + − 0. Aligned 3/4, counter 1/2, equal ½ (a tie); all 4.5/7.

    The policy prefers the one with more in 3 of the 4 and, where d < 0, in 1 of the 2: 4/6.
    """
    got = reliance(array(3, 1, 2, 5, -1, -4, 0), array(1, 2, 0.5, -1, 1, -1, 0), **QUICK)
    assert values_of(got) == {
        "aligned": 0.75,
        "counter": 0.5,
        "equal": 0.5,
        "reliance": 0.25,
        "balanced": 0.625,
        "worst_side": 0.5,
        "accuracy": pytest.approx(4.5 / 7),
    }
    assert got.counts == {"aligned": 4, "counter": 2, "equal": 1}
    assert got.preferred_more.value == pytest.approx(4 / 6) and got.preferred_more.pairs == 6
    assert got.accuracies["balanced"].pairs == 6 and got.accuracies["accuracy"].pairs == 7


pairs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-3, 3), min_size=n, max_size=n),
        st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=n, max_size=n),
        st.lists(st.integers(0, 5), min_size=n, max_size=n),
    )
)


@light
@given(pairs)
def test_reliance_is_what_a_loop_over_pairs_counts(drawn):
    difference, margins, groups = drawn
    sides = {"aligned": [], "counter": [], "equal": []}
    for d, m in zip(difference, margins, strict=True):
        side = "aligned" if d > 0 else "counter" if d < 0 else "equal"
        sides[side].append(1.0 if m > 0 else 0.5 if m == 0 else 0.0)
    expected = {side: sum(found) / len(found) if found else None for side, found in sides.items()}
    everything = [value for side in sides.values() for value in side]
    a, c = expected["aligned"], expected["counter"]
    both = a is not None and c is not None
    expected |= {
        "reliance": a - c if both else None,
        "balanced": (a + c) / 2 if both else None,
        "worst_side": min(a, c) if both else None,
        "accuracy": sum(everything) / len(everything),
    }
    got = reliance(array(*difference), array(*margins), np.array(groups), **QUICK)
    assert values_of(got) == {
        name: None if value is None else pytest.approx(value) for name, value in expected.items()
    }
    for estimate in got.accuracies.values():
        if estimate.low is not None:
            assert estimate.low <= estimate.high
        assert estimate.prompts <= estimate.pairs


@light
@given(pairs)
def test_turning_the_feature_round_swaps_the_sides_and_negates_reliance(drawn):
    difference, margins, groups = array(*drawn[0]), array(*drawn[1]), np.array(drawn[2])
    one, other = (reliance(sign * difference, margins, groups, **QUICK) for sign in (1, -1))
    assert one.accuracies["aligned"] == other.accuracies["counter"]
    assert one.accuracies["balanced"].value == pytest.approx(other.accuracies["balanced"].value)
    if one.accuracies["reliance"].value is not None:
        assert one.accuracies["reliance"].value == pytest.approx(-other.accuracies["reliance"].value)
        assert one.accuracies["reliance"].low == (
            None if other.accuracies["reliance"].high is None
            else pytest.approx(-other.accuracies["reliance"].high)
        )  # fmt: skip
    if one.preferred_more.value is not None:
        assert one.preferred_more.value == pytest.approx(1 - other.preferred_more.value)


def test_a_policy_that_goes_by_the_feature_alone_is_found_out_by_all_but_accuracy():
    """80 of 100 better answers are longer: accuracy .8 looks good, balanced ½ and reliance 1 do not."""
    difference = np.where(np.arange(100) < 80, 10.0, -10.0)
    got = values_of(reliance(difference, difference, **QUICK))
    assert (got["accuracy"], got["balanced"], got["reliance"], got["worst_side"]) == (0.8, 0.5, 1.0, 0.0)
    assert reliance(difference, difference, **QUICK).preferred_more.value == 1


def test_a_constant_feature_and_an_empty_side_are_not_measurable_and_no_nan():
    nothing = reliance(np.zeros(5), np.ones(5), length_difference=np.zeros(5), **QUICK)
    assert nothing.counts == {"aligned": 0, "counter": 0, "equal": 5}
    assert [nothing.accuracies[q].value for q in ("aligned", "counter", "reliance", "balanced")] == [None] * 4
    assert nothing.correlation.value is nothing.after_length.value is nothing.preferred_more.value is None
    one_sided = reliance(np.ones(5), array(1, 1, 1, -1, -1), **QUICK)
    assert one_sided.accuracies["aligned"].value == 0.6
    assert one_sided.accuracies["balanced"].value is None
    assert one_sided.accuracies["balanced"].pairs == 5
    empty = reliance(np.zeros(0), np.zeros(0), **QUICK)
    assert all(e.value is None and e.pairs == 0 for e in empty.accuracies.values())


def test_a_value_that_is_no_number_is_refused_with_its_row():
    with pytest.raises(ValueError, match=r"margins are not finite \(first: row 1\)"):
        reliance(np.zeros(2), array(0, np.nan), **QUICK)
    with pytest.raises(ValueError, match="difference 2, margins 3"):
        check_finite({"difference": np.zeros(2), "margins": np.zeros(3)})


@light
@given(st.integers(0, 2**31), st.integers(5, 60))
def test_rank_correlations_are_scipys_and_those_of_residuals(seed, size):
    rng = np.random.default_rng(seed)
    z = rng.integers(-5, 5, size).astype(np.float64)
    x, y = z + rng.normal(size=size), np.round(z + rng.normal(size=size))
    if np.ptp(z) == 0 or np.ptp(y) == 0:
        return
    assert rank_correlation(x, y, **QUICK).value == pytest.approx(stats.spearmanr(x, y).statistic)
    ranks = [stats.rankdata(v) for v in (x, y, z)]
    design = np.stack([np.ones(size), ranks[2]], axis=1)
    left = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    got = partial_rank_correlation(x, y, z, **QUICK)
    if got.value is not None:
        assert got.value == pytest.approx(stats.pearsonr(*left).statistic, abs=1e-8)


def test_the_correlations_interval_is_near_fishers():
    """ρ of a normal sample of 400: Fisher's z has the standard error about 1.03/√397 for ranks."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=400)
    got = rank_correlation(x, x + rng.normal(size=400), seed=0)
    z, half = np.arctanh(got.value), 1.96 * 1.03 / np.sqrt(397)
    assert (got.low, got.high) == (
        pytest.approx(np.tanh(z - half), abs=0.02),
        pytest.approx(np.tanh(z + half), abs=0.02),
    )


def test_after_length_nothing_is_left_of_a_feature_that_only_follows_length():
    rng = np.random.default_rng(2)
    length = rng.normal(size=600)
    feature, margins = length + 0.5 * rng.normal(size=600), length + 0.5 * rng.normal(size=600)
    got = reliance(feature, margins, length_difference=length, seed=0, resamples=500)
    assert got.correlation.low > 0.6
    assert got.after_length.low < 0.1 and abs(got.after_length.value) < 0.1
    assert reliance(length, margins, length_difference=length, **QUICK).after_length.value is None


def test_changes_are_now_less_then_by_hand():
    """Aligned 1 → ½ (was 1 of 2, now 2 of 2), counter 0 of 1 → 1 of 1 before: balanced .5 now, .75 then."""
    got = reliance_changes(array(1, 2, -1), array(1, 1, -1), {"round 0": array(1, -1, 1)}, **QUICK)
    change = {quantity: got[quantity]["round 0"].value for quantity in ("aligned", "counter", "balanced")}
    assert change == {"aligned": 0.5, "counter": -1.0, "balanced": -0.25}
    assert got["reliance"]["round 0"].value == 1.5
    assert got["equal"]["round 0"].value is None


@light
@given(pairs, st.integers(0, 2**31))
def test_a_change_is_the_difference_of_what_both_rounds_have(drawn, seed):
    difference, margins, groups = array(*drawn[0]), array(*drawn[1]), np.array(drawn[2])
    then = np.random.default_rng(seed).normal(size=len(margins))
    got = reliance_changes(difference, margins, {"then": then, "now": margins}, groups, **QUICK)
    now_is, then_was = (values_of(reliance(difference, m, groups, **QUICK)) for m in (margins, then))
    for quantity in QUANTITIES:
        if now_is[quantity] is None:
            assert got[quantity]["then"].value is None
        else:
            assert got[quantity]["then"].value == pytest.approx(now_is[quantity] - then_was[quantity])
            assert got[quantity]["now"].value == 0


def test_a_paired_change_has_mcnemars_standard_error():
    """1,000 pairs, 60 better and 40 worse than before: change .02, SE √(100/1000 − .02²)/√1000 = .00998."""
    now = np.concatenate([np.ones(60), np.zeros(40), np.ones(500), np.zeros(400)])
    then = np.concatenate([np.zeros(60), np.ones(40), np.ones(500), np.zeros(400)])
    sides = sides_of([now, then], np.zeros(1000), None, seed=0, resamples=4000)
    got = sides.changes("accuracy", {"then": 1})["then"]
    assert got.value == pytest.approx(0.02)
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * 0.00998, rel=0.06)
