import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method.pairing import PAIRING_RULES, expected_pairs, pair_responses, pair_with_anchors

light = settings(max_examples=60, deadline=None, derandomize=True)


def pair(rewards, prompt=None, sample=None, distinct=None, valid=None, **how):
    n = len(rewards)
    return pair_responses(
        np.array(rewards, dtype=np.float64),
        np.zeros(n, dtype=np.int64) if prompt is None else np.array(prompt),
        np.arange(n) if sample is None else np.array(sample),
        np.arange(n) if distinct is None else np.array(distinct),
        np.ones(n, dtype=bool) if valid is None else np.array(valid),
        **how,
    )


def test_best_and_worst_are_paired_within_their_prompt_and_prompts_ascend():
    """Prompt 7: rewards 1, 5, 3 in rows 0, 2, 4 → (2, 0). Prompt 2: 9, 8 in rows 1, 3 → (1, 3)."""
    got = pair([1, 9, 5, 8, 3], prompt=[7, 2, 7, 2, 7], rule="best-worst")
    assert got.prompts.tolist() == [2, 7]
    assert got.chosen.tolist() == [1, 2]
    assert got.rejected.tolist() == [3, 0]
    assert got.prompt_reason.tolist() == ["paired", "paired"]


def test_ties_of_best_and_worst_go_to_the_smaller_sample_number():
    got = pair([1, 1, 4, 4], sample=[3, 2, 1, 0], rule="best-worst")
    assert (got.chosen.tolist(), got.rejected.tolist()) == ([3], [1])


def test_prompts_without_a_pair_are_named_by_what_is_missing():
    """0: both responses the same; 1: all tie; 2: none valid; 3: one valid; 4: no response; 5: paired."""
    got = pair(
        [1, 2, 5, 5, 1, 2, 1, 2, 1, 2],
        prompt=[0, 0, 1, 1, 2, 2, 3, 3, 5, 5],
        distinct=[0, 0, 0, 1, 0, 1, 0, 1, 0, 1],
        valid=[True, True, True, True, False, False, True, False, True, True],
        rule="best-worst",
        prompts=np.arange(6),
    )
    assert got.prompt_reason.tolist() == [
        "one_distinct_response",
        "tie",
        "no_valid_response",
        "one_distinct_response",
        "no_valid_response",
        "paired",
    ]
    assert (got.chosen.tolist(), got.rejected.tolist()) == ([9], [8])


def test_no_responses_make_no_pairs_by_any_rule():
    none = np.zeros(0, dtype=np.int64)
    for rule in PAIRING_RULES:
        got = pair([], prompt=none, sample=none, distinct=none, valid=none.astype(bool), rule=rule, seeds={})
        assert got.chosen.size == got.rejected.size == got.prompts.size == 0


def test_the_rejected_of_mu_minus_two_sigma_is_the_one_nearest_to_it():
    """Rewards 0, 0, 0, 0, −5, −1: μ = −1, σ² = (4·1 + 16 + 0)/6 = 10/3, μ − 2σ = −4.65: −5 is nearest.

    Rewards 4, 2, 0: μ = 2, σ = √(8/3) = 1.63, μ − 2σ = −1.27: 0 is nearest.
    Eight 10s, 5 and 0: μ = 8.5, σ² = (18 + 12.25 + 72.25)/10, μ − 2σ = 2.1: 0 is 2.1 off, 5 is 2.9 off.
    28 10s, 6 and −2: μ = 9.47, σ = 2.25, μ − 2σ = 4.97: 6 is 1.03 off, −2 is 6.97 off; not the worst.
    """
    assert pair([0, 0, 0, 0, -5, -1], rule="best-mu-2sigma").rejected.tolist() == [4]
    assert pair([4, 2, 0], rule="best-mu-2sigma").rejected.tolist() == [2]
    assert pair([10] * 8 + [5, 0], rule="best-mu-2sigma").rejected.tolist() == [9]
    assert pair([10] * 28 + [6, -2], rule="best-mu-2sigma").rejected.tolist() == [28]


def test_repeated_samples_weigh_in_the_mean_but_are_one_candidate():
    """28 times the same text with reward 10, then 6 and −2: as above, though only 3 are distinct."""
    distinct = [0] * 28 + [1, 2]
    assert pair([10] * 28 + [6, -2], distinct=distinct, rule="best-mu-2sigma").rejected.tolist() == [28]


def test_all_takes_every_pair_of_distinct_responses_that_differ():
    """Rewards 3, 1, 3, 2, the last one a repeat of row 1's text: rows 0, 1, 2 remain, 0 > 1 and 2 > 1."""
    got = pair([3, 1, 3, 2], distinct=[0, 1, 2, 1], rule="all")
    assert list(zip(got.chosen.tolist(), got.rejected.tolist(), strict=True)) == [(0, 1), (2, 1)]


def test_random_hangs_on_the_prompts_own_seed_only():
    rewards, prompt = list(range(20)) * 2, [0] * 20 + [1] * 20
    sample = list(range(20)) * 2
    drawn = [pair(rewards, prompt, sample, rule="best-random", seeds={0: s, 1: 5}).rejected for s in range(8)]
    assert len({int(rejected[0]) for rejected in drawn}) > 3
    assert len({int(rejected[1]) for rejected in drawn}) == 1
    as_array = pair(rewards, prompt, sample, rule="best-random", seeds=np.array([0, 5])).rejected
    assert as_array.tolist() == drawn[0].tolist()


@st.composite
def responses(draw):
    n = draw(st.integers(1, 30))
    column = lambda high: draw(st.lists(st.integers(0, high), min_size=n, max_size=n))  # noqa: E731
    prompt, distinct, valid = column(4), column(5), column(4)
    # The same text of a prompt has the same reward; of few values, so that ties are common.
    rewards = [(7 * p + 3 * d) % 4 for p, d in zip(prompt, distinct, strict=True)]
    return rewards, prompt, list(range(n)), distinct, [v > 0 for v in valid]


@light
@given(responses(), st.sampled_from(PAIRING_RULES), st.randoms(use_true_random=False))
def test_pairs_are_valid_ordered_and_the_same_for_any_order_of_the_rows(rows, rule, random):
    seeds = {p: p + 10 for p in range(5)}
    got = pair(*rows, rule=rule, seeds=seeds)
    rewards, prompt, _, distinct, valid = (np.array(column) for column in rows)
    assert (prompt[got.chosen] == prompt[got.rejected]).all()
    assert (rewards[got.chosen] > rewards[got.rejected]).all()
    assert valid[got.chosen].all()
    assert valid[got.rejected].all()
    assert (distinct[got.chosen] != distinct[got.rejected]).all()
    paired = got.prompts[got.prompt_reason == "paired"]
    assert np.unique(prompt[got.chosen]).tolist() == paired.tolist()
    if rule != "all":
        assert prompt[got.chosen].tolist() == paired.tolist()
        best = {p: rewards[valid & (prompt == p)].max() for p in paired}
        assert [best[p] for p in paired] == rewards[got.chosen].tolist()
    if rule == "best-worst":
        assert [rewards[valid & (prompt == p)].min() for p in paired] == rewards[got.rejected].tolist()

    order = random.sample(range(len(prompt)), len(prompt))
    turned = pair(*([column[i] for i in order] for column in rows), rule=rule, seeds=seeds)
    back = np.array(order)
    assert sorted(zip(back[turned.chosen], back[turned.rejected], strict=True)) == sorted(
        zip(got.chosen, got.rejected, strict=True)
    )
    assert turned.prompt_reason.tolist() == got.prompt_reason.tolist()


@pytest.mark.parametrize(
    ("rewards", "how", "message"),
    [
        ([1, 2], {"rule": "best"}, "choose one of best-worst"),
        ([1, np.nan], {"rule": "best-worst"}, "mark them invalid"),
        ([1, 2], {"rule": "best-random"}, "give `seeds`"),
        ([1, 2], {"rule": "all", "prompts": np.array([3])}, "list every prompt"),
    ],
)
def test_responses_that_cannot_be_paired_are_refused_with_the_remedy(rewards, how, message):
    with pytest.raises(ValueError, match=message):
        pair(rewards, **how)


def test_a_reward_that_is_not_finite_is_not_looked_at_where_the_response_is_invalid():
    got = pair([1, np.nan, 2], valid=[True, False, True], rule="best-mu-2sigma")
    assert (got.chosen.tolist(), got.rejected.tolist()) == ([2], [0])


def test_anchors_are_only_rejected_and_the_policys_responses_only_chosen():
    """Prompt 4: the policy's best is row 1, the start policy's worst row 4. 2: the worst anchor ties with the
    best. 1: the anchor is better. 7: no valid anchor. 8: no response."""
    rewards = np.array([1.0, 3.0, 0.0, 2.5, -1.0, 9.0, 5.0, 5.0, 1.0, 2.0, 4.0, -7.0])
    prompt = np.array([4, 4, 4, 4, 4, 4, 2, 2, 1, 1, 7, 7])
    sample = np.array([0, 1, 2, 3, 4, 5, 0, 3, 0, 3, 0, 3])
    valid = np.ones(12, dtype=bool)
    valid[11] = False
    got = pair_with_anchors(rewards, prompt, sample, valid, sample >= 3, np.array([1, 2, 4, 7, 8]))
    assert (got.chosen.tolist(), got.rejected.tolist()) == ([1], [4])
    assert got.prompt_reason.tolist() == [
        "anchor_not_below", "anchor_not_below", "paired", "no_valid_response", "no_valid_response"
    ]  # fmt: skip
    none = np.zeros(0, dtype=np.int64)
    empty = pair_with_anchors(none.astype(float), none, none, none == 1, none == 1, none)
    assert empty.chosen.size == empty.rejected.size == empty.prompt_reason.size == 0


@pytest.mark.parametrize("rule", PAIRING_RULES)
def test_the_pairs_expected_of_a_prompt_are_those_of_different_rewards(rule):
    got = pair([1, 4, 2, 3], rule=rule, seeds={0: 1})
    assert got.chosen.size == expected_pairs(rule, 4) == (6 if rule == "all" else 1)
    assert expected_pairs("my_rules:pairs", 4) == expected_pairs("best-anchored", 4) == 1
