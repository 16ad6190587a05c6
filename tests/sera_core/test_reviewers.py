import numpy as np
import pytest

from sera_core.method.selection import select
from sera_core.reviewers import judge_responses, sweep_of_pairs, sweep_of_responses

RULES = {"rule": "top-fraction", "fraction": 0.7, "min_margin": 0.0, "direction": "large"}


def ids(count):
    return [f"{n:04}" for n in range(count)]


@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_margins_and_ties_do_not_hang_on_beta(beta):
    """5,000 responses a few millionths of a nat apart: distinct log-probabilities stay distinct rewards."""
    rng = np.random.default_rng(0)
    policy = -rng.permutation(5000) * 1e-6 - 20
    judged = judge_responses("implicit", beta, [1.0], [policy], [np.full(5000, -20.0)], np.full(5000, 9))
    assert len(np.unique(judged.reward)) == len(np.unique(judged.ensemble)) == 5000
    np.testing.assert_allclose(judged.reward / beta, policy + 20, atol=1e-9)


def test_a_score_a_token_is_rounded_on_its_own_scale():
    """A millionth of a nat over 400 tokens is 2.5e-9 a token: two such responses are no tie."""
    policy = np.array([-100.0, -100.000001])
    judged = judge_responses("simpo", 2.0, [1.0], [policy], [], np.array([400, 400]))
    assert judged.reward[0] > judged.reward[1]


def pairs_with_bias(count, seed=0):
    """Human pairs whose margin grows with the length difference, chosen and rejected in turn."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, 2 * count)
    difference = (tokens[0::2] - tokens[1::2]).astype(float)
    margins = 0.2 * difference + rng.normal(0, 2, count)
    rewards = np.zeros(2 * count)
    rewards[0::2] = margins
    return rewards, tokens


def test_one_response_without_a_finite_reward_spoils_one_pair():
    policy, tokens = pairs_with_bias(100)
    policy[7] = -np.inf
    sweep = sweep_of_pairs(tokens, ids(100), 0.1, RULES, seed=0)
    judged = judge_responses("implicit", 0.1, [1.0], [policy], [np.zeros(200)], tokens, sweep)
    assert judged.penalty is not None and np.isfinite(judged.penalty["alpha"])
    assert np.flatnonzero(~np.isfinite(judged.ensemble)).tolist() == [7]


def test_on_human_pairs_the_penalty_balances_the_pairs_that_are_kept():
    policy, tokens = pairs_with_bias(400)

    def kept_difference(sweep):
        judged = judge_responses("implicit", 0.1, [1.0], [policy], [np.zeros(800)], tokens, sweep)
        margins = (judged.ensemble[0::2] - judged.ensemble[1::2]) / 0.1
        kept = select(margins, ids(400), **RULES).kept
        return (tokens[0::2] - tokens[1::2])[kept].mean()

    balanced = kept_difference(sweep_of_pairs(tokens, ids(400), 0.1, RULES, seed=0))
    assert kept_difference(None) > 10 and abs(balanced) < 3  # as near as the grid of penalties comes


def test_responses_that_may_not_be_paired_do_not_decide_the_penalty():
    """A cut response of 500 tokens leads every prompt; without it the two others differ by 10 tokens."""
    tokens = np.tile([500, 30, 20], 20)
    prompts, rewards = np.repeat(np.arange(20), 3), np.tile([9.0, 2.0, 1.0], 20)
    usable = np.tile([False, True, True], 20)
    assert sweep_of_responses(tokens, prompts, usable)(rewards) == 10
    assert sweep_of_responses(tokens, prompts, np.ones(60, bool))(rewards) == 480
    assert np.isnan(sweep_of_responses(tokens, prompts, np.zeros(60, bool))(rewards))
