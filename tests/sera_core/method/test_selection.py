import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method.selection import (
    SELECTION_RULES,
    expected_kept,
    prompt_variance,
    round_half_up,
    select,
)

light = settings(max_examples=60, deadline=None, derandomize=True)
some_margins = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf, -np.inf]), st.floats(-5, 5)),
    min_size=1,
    max_size=40,
)


def pick(margins, **how):
    ids = [f"pair-{i:03}" for i in range(len(margins))]
    return select(np.array(margins, dtype=np.float64), ids, **how)


def test_the_top_fraction_is_of_all_finite_pairs_and_the_floor_cuts_it_further():
    """Finite: 3, 2, 1, −1, 0; 0.8 of 5 is 4, so the cut is after 0 (ranks 3:1, 2:2, 1:3, 0:4, −1:5).

    0 is inside the cut but not above the floor; −1 is neither and counts as not preferred.
    """
    got = pick([1, 3, np.nan, -1, 2, 0], rule="top-fraction", fraction=0.8)
    assert got.kept.tolist() == [True, True, False, False, True, False]
    assert got.rank.tolist() == [3, 1, 0, 5, 2, 4]
    assert got.reason.tolist() == ["kept", "kept", "non_finite", "not_preferred", "kept", "not_preferred"]
    assert not got.swapped.any()


def test_a_pair_above_the_floor_beyond_the_cut_is_below_cut():
    got = pick([4, 3, 2, 1], rule="top-fraction", fraction=0.5)
    assert got.reason.tolist() == ["kept", "kept", "below_cut", "below_cut"]


def test_without_a_floor_exactly_the_fraction_is_kept():
    for n in (10, 100, 1000):
        got = pick(np.linspace(-3, 3, n), rule="top-fraction", fraction=0.9, min_margin=-np.inf)
        assert got.kept.sum() == n * 9 // 10


def test_the_floor_is_strict():
    assert pick([0.5, 0.6], rule="top-k", k=2, min_margin=0.5).kept.tolist() == [False, True]


def test_small_margins_are_preferred_above_the_floor_only():
    """Above the floor: 1, 2, 3; half of four is 2: 1 and 2 are kept, 3 is beyond, −4 below the floor."""
    got = pick([3, -4, 1, 2], rule="top-fraction", fraction=0.5, direction="small")
    assert got.reason.tolist() == ["below_cut", "not_preferred", "kept", "kept"]
    assert got.rank.tolist() == [3, 4, 1, 2]


def test_top_k_keeps_k_and_ties_go_by_id():
    assert pick([1, 2, 1, 2], rule="top-k", k=3).kept.tolist() == [True, True, False, True]


def test_the_middle_is_what_is_nearest_to_the_median_in_rank():
    """Finite, ascending: −9, 1, 2, 3, 50; three of five around 2, and −9 would not be above the floor."""
    got = pick([50, 1, np.nan, 3, -9, 2], rule="middle", fraction=0.6)
    assert got.kept.tolist() == [False, True, False, True, False, True]
    assert got.rank.tolist() == [4, 3, 0, 2, 5, 1]  # the larger margin first where two are as near
    assert got.reason.tolist() == ["not_middle", "kept", "non_finite", "kept", "not_preferred", "kept"]
    low = pick([50, 1, 3, -9, 2], rule="middle", fraction=1.0, direction="small")
    assert low.reason.tolist() == ["kept", "kept", "kept", "not_preferred", "kept"]


def test_the_threshold_itself_is_kept():
    assert pick([1, 2, 3], rule="threshold", threshold=2).reason.tolist() == ["below_cut", "kept", "kept"]
    small = pick([1, 2, 3], rule="threshold", threshold=2, direction="small")
    assert small.reason.tolist() == ["kept", "kept", "below_cut"]
    assert pick([-1, 2], rule="threshold", threshold=-2).reason.tolist() == ["not_preferred", "kept"]


def test_relabel_keeps_all_and_turns_pairs_the_policy_disagrees_with():
    got = pick([1, -1, 0, np.nan], rule="relabel")
    assert got.kept.tolist() == [True, True, True, False]
    assert got.swapped.tolist() == [False, True, False, False]
    assert got.reason.tolist() == ["kept", "kept", "kept", "non_finite"]
    assert got.rank.tolist() == [1, 3, 2, 0]


def test_none_keeps_every_finite_pair_and_turns_none():
    got = pick([1, -1, np.inf], rule="none")
    assert got.kept.tolist() == [True, True, False]
    assert not got.swapped.any()


def test_bottom_keeps_the_least_preferred_as_many_as_the_rule_achieved():
    """0.75 of 4 is 3, but only 2 are above the floor: bottom keeps 2, the smallest, floor or not."""
    got = pick([2, 1, -1, -2], rule="bottom", fraction=0.75)
    assert got.reason.tolist() == ["above_cut", "above_cut", "kept", "kept"]
    assert got.rank.tolist() == [4, 3, 2, 1]
    small = pick([2, 1, -1, -2], rule="bottom", fraction=0.75, direction="small")
    assert small.kept.tolist() == [True, True, False, False]


def test_random_draws_another_set_for_another_seed_and_takes_pairs_below_the_floor_too():
    margins = np.linspace(-1, 1, 60)
    first, second = (pick(margins, rule="random", seed=seed) for seed in (1, 2))
    assert first.kept.sum() == second.kept.sum() == 30  # 42 are asked for, 30 are above 0
    assert not np.array_equal(first.kept, second.kept)
    assert first.kept[:30].any()
    assert set(first.reason) == {"kept", "not_drawn"}
    assert pick(margins, rule="random", score_kept=7).kept.sum() == 7


@light
@given(
    some_margins,
    st.sampled_from(SELECTION_RULES),
    st.floats(0, 1),
    st.sampled_from(["large", "small"]),
    st.sampled_from([0.0, -np.inf, 1.0]),
    st.randoms(use_true_random=False),
)
def test_permuting_the_input_permutes_the_output(margins, rule, fraction, direction, floor, random):
    how = {"rule": rule, "fraction": fraction, "k": 5, "direction": direction, "min_margin": floor, "seed": 3}
    margins = np.array(margins, dtype=np.float64)
    ids = np.array([f"{i:03}" for i in range(margins.size)])
    order = np.array(random.sample(range(margins.size), margins.size))
    straight, turned = select(margins, ids, **how), select(margins[order], ids[order], **how)
    for field in ("kept", "rank", "reason", "swapped"):
        assert getattr(straight, field)[order].tolist() == getattr(turned, field).tolist()


@light
@given(some_margins, st.sampled_from(["top-fraction", "top-k", "threshold"]), st.floats(0, 1), st.booleans())
def test_no_dropped_pair_above_the_floor_is_preferred_to_a_kept_one(margins, rule, fraction, small):
    direction = "small" if small else "large"
    got = pick(margins, rule=rule, fraction=fraction, k=4, threshold=1.0, direction=direction)
    margins = np.array(margins)
    cut = margins[got.reason == "below_cut"]
    kept = margins[got.kept]
    assert (kept > 0).all()
    if cut.size and kept.size:
        assert kept.max() <= cut.min() if small else kept.min() >= cut.max()
    if kept.size and not small:
        assert kept.min() >= margins[np.isfinite(margins) & ~got.kept].max(initial=-np.inf)


@light
@given(some_margins, st.floats(0, 1), st.integers(0, 99))
def test_every_pair_has_a_reason_and_the_controls_keep_what_the_rule_achieved(margins, fraction, seed):
    finite = np.isfinite(margins)
    preferred = pick(margins, rule="top-fraction", fraction=fraction)
    assert preferred.kept.sum() <= round_half_up(fraction * finite.sum())
    for rule in SELECTION_RULES:
        got = pick(margins, rule=rule, fraction=fraction, seed=seed)
        assert ((got.reason == "kept") == got.kept).all()
        assert ((got.reason == "non_finite") == ~finite).all()
        assert sorted(got.rank[finite]) == list(range(1, finite.sum() + 1))
        assert (got.rank[~finite] == 0).all()
        if rule in ("random", "bottom"):
            assert got.kept.sum() == preferred.kept.sum()


def test_halves_are_rounded_up_even_where_float64_falls_short():
    """0.145 · 100 is 14.499999999999998 in float64 and means 14.5."""
    assert [round_half_up(x) for x in (2.5, 0.145 * 100, 2.49, 3.0)] == [3, 15, 2, 3]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rule": "best"}, "choose one of top-fraction"),
        ({"rule": "none", "direction": "up"}, "'large' or 'small'"),
        ({"rule": "top-fraction", "fraction": 1.1}, r"\[0, 1\]"),
        ({"rule": "top-k", "k": -1}, "cannot be negative"),
        ({"rule": "threshold", "threshold": np.nan}, "-inf turns the floor off"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_its_remedy(how, message):
    with pytest.raises(ValueError, match=message):
        pick([1, 2], **how)


def test_ids_that_repeat_or_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="drop duplicate pairs"):
        select(np.zeros(2), ["a", "a"], rule="none")
    with pytest.raises(ValueError, match="one id a pair"):
        select(np.zeros(2), ["a"], rule="none")


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_the_pairs_expected_are_those_kept_where_the_floor_drops_none(rule):
    """Half of 9 pairs is 5; margins 1 to 9, all above the floor and the threshold."""
    margins = [float(n) for n in range(1, 10)]
    got = pick(margins, rule=rule, fraction=0.5, k=4, threshold=0.5)
    assert got.kept.sum() == expected_kept(rule, 9, 0.5, 4)
    assert expected_kept(rule, 3, 0.5, 4) == (
        2 if rule in ("top-fraction", "middle", "random", "bottom") else 3
    )


def test_prompt_variance_is_the_variance_of_the_preference_probability():
    """By its definition: over ordered pairs of different responses, computed one by one."""
    rng = np.random.default_rng(3)
    rewards, prompts = rng.normal(0, 2, 12), np.array([0, 1, 0, 2, 2, 1, 0, 2, 3, 4, 4, 4])
    rewards[[1, 9]] = np.nan
    found = prompt_variance(rewards, prompts)
    for prompt in range(5):
        own = [r for r, p in zip(rewards, prompts, strict=True) if p == prompt and np.isfinite(r)]
        preferred = [1 / (1 + np.exp(b - a)) for i, a in enumerate(own) for j, b in enumerate(own) if i != j]
        assert found[prompt] == pytest.approx(np.var(preferred) if preferred else 0.0)
    assert found[3] == 0 and prompt_variance(np.zeros(0), np.zeros(0, dtype=int)).size == 0


def test_the_rule_prompt_variance_keeps_the_prompts_that_vary_most_above_the_floor():
    got = pick([9, 1, 2, -1], rule="prompt-variance", fraction=0.5, variance=np.array([0.1, 0.2, 0.15, 0.24]))
    assert got.kept.tolist() == [False, True, True, False]
    assert got.reason.tolist() == ["below_cut", "kept", "kept", "not_preferred"]
    with pytest.raises(ValueError, match="needs all responses of each prompt"):
        pick([1, 2], rule="prompt-variance")
