import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method.mixing import (
    drops_most,
    mix,
    mixed_counts,
    needed_generated,
    prompts_needed,
    share_for_round,
    training_order,
)

light = settings(max_examples=80, deadline=None, derandomize=True)


def mixed(h, g, **how):
    """A mix of h human and g generated pairs whose places are their numbers."""
    human, generated = np.arange(h), np.arange(g)
    ids = [f"h{i}" for i in range(h)], [f"g{i}" for i in range(g)]
    return mix(human, ids[0], generated, ids[1], seed=how.pop("seed", 0), **how)


def counts(mixture):
    return mixture.human.size, mixture.generated.size


def test_a_schedule_is_read_by_round_and_its_last_value_repeats():
    assert [share_for_round(t, [0.3, 0.5, 0.7], None) for t in range(6)] == [0, 0.3, 0.5, 0.7, 0.7, 0.7]


def test_a_ramp_is_a_line_over_its_own_rounds():
    """From 0.2 to 0.8 over 4 rounds: steps of 0.2, then constant; over 1 round: the end."""
    got = [share_for_round(t, None, (0.2, 0.8, 4)) for t in range(7)]
    np.testing.assert_allclose(got, [0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8], atol=1e-15)
    assert share_for_round(1, None, (0.2, 0.8, 1)) == 0.8


@pytest.mark.parametrize(
    ("t", "shares", "ramp", "message"),
    [
        (1, None, None, "not as both"),
        (1, [0.3], (0.1, 0.2, 3), "not as both"),
        (1, [0.3, 1.2], None, r"\[0, 1\]"),
        (1, [], None, "there must be one"),
        (1, None, (0.1, 0.2, 0), "at least one round"),
        (-1, [0.3], None, "numbered from 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(t, shares, ramp, message):
    with pytest.raises(ValueError, match=message):
        share_for_round(t, shares, ramp)


@pytest.mark.parametrize(
    ("h", "g", "how", "expected"),
    [
        # n = min(100, 100/0.7, 100/0.3) = 100
        (100, 100, {"share": 0.3}, (70, 30)),
        # too few generated: n = ⌊30/0.6⌋ = 50, the human side is cut to keep the share
        (100, 30, {"share": 0.6}, (20, 30)),
        # asked for more than there is: n = ⌊min(200, 7/0.7)⌋ = 10, though float64 misses 7/0.7 = 10
        (7, 100, {"share": 0.3, "size": 200}, (7, 3)),
        # n = ⌊min(10, 10/0.75, 1/0.25)⌋ = 4
        (10, 1, {"share": 0.25}, (3, 1)),
        # a half pair is rounded up to the generated side: n = 5, 2.5 → 3
        (5, 5, {"share": 0.5}, (2, 3)),
        (5, 5, {"share": 0.0}, (5, 0)),
        (5, 3, {"share": 1.0}, (0, 3)),
        # fill: n = min(100, 130), 60 are asked of 30, the human side fills up
        (100, 30, {"share": 0.6, "on_short": "fill"}, (70, 30)),
        # fill the other way: n = min(50, 110) = 50, 25 human are asked of 10
        (10, 100, {"share": 0.5, "size": 50, "on_short": "fill"}, (10, 40)),
        # fill with all there is: n = min(500, 110)
        (10, 100, {"share": 0.5, "size": 500, "on_short": "fill"}, (10, 100)),
    ],
)
def test_the_counts_are_those_of_the_formula(h, g, how, expected):
    got = mixed(h, g, **how)
    assert counts(got) == expected
    assert got.share == pytest.approx(expected[1] / sum(expected))
    assert got.reason is None


@pytest.mark.parametrize("on_short", ["keep-share", "fill"])
def test_generated_pairs_that_are_wanted_but_missing_make_no_mix(on_short):
    got = mixed(10, 0, share=0.3, on_short=on_short)
    assert (counts(got), got.reason, got.share) == ((0, 0), "no_pairs", 0.0)
    assert got.over_share_human.all()


def test_a_mix_without_any_pair_says_so():
    assert mixed(0, 0, share=0.0).reason == "no_pairs"
    assert mixed(0, 9, share=0.5, size=4).reason == "no_pairs"


def test_the_first_places_are_taken_first_on_both_sides():
    got = mix(
        np.array([3, 1, 2]),
        ["a", "b", "c"],
        np.array([5, 4]),
        ["d", "e"],
        share=0.5,
        size=2,
        seed=0,
    )
    assert (got.human.tolist(), got.generated.tolist()) == ([1], [1])
    assert got.over_share_human.tolist() == [True, False, True]
    assert got.over_share_generated.tolist() == [True, False]


def test_equal_places_go_by_a_seeded_draw_that_does_not_see_the_input_order():
    ids = [f"{i:02}" for i in range(40)]

    def taken(names, seed):
        got = mix(np.zeros(40, dtype=int), names, np.zeros(0, dtype=int), [], share=0.0, size=10, seed=seed)
        return {names[i] for i in got.human}

    assert taken(ids, 1) == taken(ids[::-1], 1)
    assert taken(ids, 1) != taken(ids, 2)


@light
@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])),
    st.one_of(st.none(), st.integers(1, 100)),
    st.sampled_from(["keep-share", "fill"]),
)
def test_the_share_holds_to_rounding_and_every_pair_is_accounted_for(h, g, share, size, on_short):
    got = mixed(h, g, share=share, size=size, on_short=on_short)
    n_human, n_generated = counts(got)
    n = n_human + n_generated
    assert n <= (h if size is None else size)
    assert n_human == h - got.over_share_human.sum()
    assert n_generated == g - got.over_share_generated.sum()
    assert got.target_share == share
    # Places are the numbers: what is taken is the first n of each side.
    assert got.human.tolist() == list(range(n_human))
    assert got.generated.tolist() == list(range(n_generated))
    if got.reason is None and on_short == "keep-share":
        assert abs(n_generated - share * n) <= 0.5 + 1e-6
        # One pair more would break a bound of the formula.
        bounds = [h if size is None else size] + ([h / (1 - share)] if share < 1 else [])
        assert n + 1 > min(bounds + ([g / share] if share > 0 else [])) - 1e-6
    if got.reason is None and on_short == "fill":
        assert n == min(h if size is None else size, h + g)


@light
@given(
    st.lists(st.text("abcdef", min_size=1, max_size=4), unique=True, min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_the_training_order_is_a_permutation_that_does_not_see_the_input_order(ids, seed):
    order = training_order(ids, seed)
    assert sorted(order) == list(range(len(ids)))
    turned = ids[::-1]
    assert [ids[i] for i in order] == [turned[i] for i in training_order(turned, seed)]
    # A pair less leaves the others in the order they had.
    without = [i for i in ids if i != ids[0]]
    assert [without[i] for i in training_order(without, seed)] == [ids[i] for i in order if i != 0]


@pytest.mark.parametrize(("order", "sign"), [("easy-first", -1), ("hard-first", 1)])
def test_a_curriculum_goes_by_margin_and_equal_ones_by_the_seed(order, sign):
    ids, margins = [str(i) for i in range(30)], np.arange(30) % 3 / 2
    found = training_order(ids, 0, margins, order)
    assert (np.diff(sign * margins[found]) >= 0).all() and sorted(found) == list(range(30))
    hashed = training_order(ids, 0)
    for value in np.unique(margins):
        same = [i for i in found if margins[i] == value]
        assert same == [i for i in hashed if margins[i] == value]
    for wrong, held in (("hardest", margins), (order, None), (order, np.full(30, np.nan))):
        with pytest.raises(ValueError, match="order"):
            training_order(ids, 0, held, wrong)


def test_another_seed_trains_in_another_order():
    ids = [str(i) for i in range(30)]
    assert training_order(ids, 0).tolist() != training_order(ids, 1).tolist()
    assert training_order(ids, 0).tolist() != list(range(30))
    with pytest.raises(ValueError, match="drop duplicate pairs"):
        training_order(["a", "a"], 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"share": 1.5}, r"\[0, 1\]"),
        ({"share": 0.5, "size": 0}, "at least one pair"),
        ({"share": 0.5, "on_short": "stop"}, "'keep-share' or 'fill'"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        mixed(3, 3, **how)


def test_places_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 human places but 1 ids"):
        mix(np.arange(2), ["a"], np.arange(0), [], share=0.0, seed=0)


@pytest.mark.parametrize(
    ("human", "share", "size", "expected"),
    [
        (100, 0.3, None, 30),  # n = min(100, 142) = 100
        (100, 0.3, 1000, 43),  # n = ⌊100/0.7⌋ = 142, ⌈42.6⌉: 0.3/0.7 of 100 is 42.9
        (45, 0.25, 40, 10),  # n = min(40, 60)
        (45, 0.4, 40, 16),
        (101, 0.3, None, 31),  # 30 would leave n = ⌊30/0.3⌋ = 100
        (100, 0.07, None, 7),  # 0.07 · 100 is 7.000000000000001
        (7, 0.3, 200, 3),  # n = 7/0.7 = 10
        (45, 0.0, None, 0),
        (0, 0.5, 40, 0),
        (45, 1.0, 40, 40),
        (45, 1.0, None, None),
    ],
)
def test_the_generated_pairs_needed_are_the_share_of_the_largest_mix(human, share, size, expected):
    assert needed_generated(human, share, size) == expected


@pytest.mark.parametrize(
    ("generated", "pairs_a_prompt", "prompts", "expected"),
    [
        (10, 0.7, 64, 18),  # 1.25 · 10/0.7 = 17.9
        (16, 0.7, 64, 29),  # 28.6
        (4, 1.0, 64, 5),  # 5 exactly
        (4, 6.0, 64, 1),  # all pairs of four responses: 5/6
        (98, 0.7, 64, 64),  # 175, but there are 64
        (0, 0.7, 64, 1),
        (5, 0.0, 64, 64),
        (None, 0.7, 64, 64),
        (10, 0.7, 0, 0),
    ],
)
def test_prompts_are_sampled_for_a_quarter_more_than_the_pairs_needed(
    generated, pairs_a_prompt, prompts, expected
):
    assert prompts_needed(generated, pairs_a_prompt, prompts) == expected


@light
@given(
    st.integers(1, 300),
    st.floats(0.01, 0.99),
    st.one_of(st.none(), st.integers(1, 600)),
    st.floats(0.05, 5),
)
def test_so_many_prompts_at_that_yield_cost_no_human_pair(human, share, size, pairs_a_prompt):
    needed = needed_generated(human, share, size)
    assert needed is not None
    generated = int(pairs_a_prompt * prompts_needed(needed, pairs_a_prompt, 10**9))
    plenty = mixed_counts(human, 10**9, share, size, "keep-share")
    assert mixed_counts(human, generated, share, size, "keep-share") == plenty
    assert mixed_counts(human, needed, share, size, "keep-share") == plenty


def test_more_than_half_is_most():
    assert drops_most(45, 21) and not drops_most(45, 22)
    assert drops_most(44, 21) and not drops_most(44, 22)
    assert drops_most(2, 0) and not drops_most(1, 0) and not drops_most(0, 0)
    assert not any(drops_most(h, mixed_counts(h, h, 0.5, None, "keep-share")[0]) for h in range(50))
