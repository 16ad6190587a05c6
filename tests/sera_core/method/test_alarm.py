import numpy as np
import pytest

from sera_core.method.alarm import HEAD, RANDOM, panel_alarm
from sera_core.method.diagnostics import amplification_alarm
from tests.sera_core.method.sweep import cell, fitted, kept_by_margin, null, pairs

SIZE = 400


def right(aligned, counter):
    """Correctness with so many right pairs at the beginning of each half."""
    places = np.arange(SIZE)
    return ((places < aligned) | ((places >= 200) & (places < 200 + counter))) * 1.0


def planted(counter_right, aligned_right=160, kept_aligned=150, **how):
    """400 held-out and 400 train pairs, half of each on either side; 160 are right on each side before.

    The kept ones are so many of the 200 where the chosen answer has more, and 100 of the others.
    """
    side = np.where(np.arange(SIZE) < 200, 1.0, -1.0)
    given = {
        "heldout": {"length": side, "lists": np.zeros(SIZE)},
        "train": {"length": side, "lists": np.zeros(SIZE)},
        "correct_now": right(aligned_right, counter_right),
        "correct_head": right(160, 160),
        "correct_random": None,
        "kept": right(kept_aligned, 100) > 0,
        "heldout_groups": None,
        "train_groups": None,
        "seed": 0,
    }
    return panel_alarm(**(given | how))


def test_the_feature_that_is_amplified_is_named_with_its_numbers():
    """Counter side 160 → 120 of 200: −0.2. Kept 150 of 250 have more, all 200 of 400: +0.1."""
    got = planted(120)
    assert got.raised == ("length",)
    assert got.alarms["length"].counter_change.value == pytest.approx(-0.2)
    assert got.alarms["length"].kept_share_excess.value == pytest.approx(0.1)
    assert got.sentence.startswith(
        "1 of 1 features amplified against the last head: length (accuracy where the"
    )
    assert "-0.200 [" in got.sentence and "+0.100 [" in got.sentence
    assert got.open == ("lists",) and got.sentence.endswith("lists: too few pairs to tell")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"counter_right": 160}, "counter_side_holds"),
        ({"counter_right": 180}, "counter_side_holds"),
        ({"counter_right": 120, "aligned_right": 120}, "both_sides_fall"),
        ({"counter_right": 120, "kept_aligned": 100}, "selection_not_skewed"),
        ({"counter_right": 120, "kept_aligned": 60}, "selection_not_skewed"),
    ],
)
def test_each_of_the_three_conditions_is_needed(how, reason):
    got = planted(**how)
    assert got.alarms["length"].reason == reason
    assert got.raised == () and got.sentence.startswith("none of 1 features is amplified")


def test_a_random_arm_takes_the_place_of_the_last_head():
    """Both arms fell alike, so it was the round and not the selection."""
    alike = planted(120)
    arm = planted(120, correct_random=right(160, 120))
    assert alike.comparison == HEAD and arm.comparison == RANDOM
    assert arm.raised == () and arm.alarms["length"].reason == "counter_side_holds"
    worse = planted(120, correct_random=right(160, 160), correct_head=right(160, 120))
    assert worse.raised == ("length",) and RANDOM in worse.sentence


def test_the_panels_alarm_is_that_of_each_feature_alone():
    rng = np.random.default_rng(0)
    heldout = {name: rng.normal(size=SIZE) for name in "abc"}
    train = {name: rng.normal(size=SIZE) for name in "abc"}
    now, head = (rng.integers(0, 2, SIZE).astype(np.float64) for _ in range(2))
    kept, groups = rng.random(SIZE) < 0.7, rng.integers(0, 100, SIZE)
    how = {"heldout": heldout, "train": train, "correct_now": now, "correct_head": head, "kept": kept}
    got = planted(160, **how, heldout_groups=groups, train_groups=groups)
    for name in "abc":
        alone = amplification_alarm(
            heldout_feature=heldout[name], correct_now=now, correct_before=head, train_feature=train[name],
            kept=kept, comparison=HEAD, seed=0, heldout_groups=groups, train_groups=groups,
        )  # fmt: skip
        assert got.alarms[name] == alone


def test_different_panels_on_the_two_sides_are_refused():
    with pytest.raises(
        ValueError, match=r"held-out pairs \(length, lists\) are not those of the train pairs \(b\)"
    ):
        planted(160, train={"b": np.zeros(SIZE)})


def test_the_stand_ins_policy_is_the_maximum_of_its_likelihood():
    """Another way to it: plain gradient ascent on Σ log σ(x·w) − 5 |w|²."""
    rows = pairs(np.random.default_rng(0), 300, 0.8, 0.1)
    weights = np.zeros(rows.shape[1])
    for _ in range(4000):
        weights += 0.002 * (rows.T @ (1 / (1 + np.exp(rows @ weights))) - 10 * weights)
    assert fitted(rows) == pytest.approx(weights, abs=1e-6)


def test_the_stand_in_keeps_the_largest_margins_above_0():
    """70 % of 5 is 3.5, rounded to the even 4; of 4 it is 3, of which only one is above 0."""
    assert kept_by_margin(np.array([3.0, -1, 2, 1, 0.5])).tolist() == [True, False, True, True, True]
    assert kept_by_margin(np.array([3.0, 1, 2, 4, 0.5])).tolist() == [True, True, True, True, False]
    assert kept_by_margin(np.array([-1.0, -2, 3, -4])).tolist() == [False, False, True, False]


def test_a_strong_feature_raises_the_alarm_and_none_does_not():
    """The whole sweep: python -m tests.sera_core.method.sweep."""
    strong, absent = cell(0.9, 0.0, 4), cell(0.5, 0.3, 4)
    assert strong.clean >= 0.75 and strong.truth < -0.05
    assert absent.clean <= 0.25
    assert null(0.2, 4)[0] <= 0.05
