"""Implicit rewards, margins, ensembles over rounds, and length-aware variants.

All values are float64. A log-probability is the sum over a response's tokens, in nats; a reward includes β, a
margin does not.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

SCORES = ("implicit", "avg-implicit", "simpo")
ENSEMBLES = ("last-two", "mean", "ema")


def implicit_reward(
    policy_logps: Float[np.ndarray, " response"], ref_logps: Float[np.ndarray, " response"], beta: float | int
) -> Float[np.ndarray, " response"]:
    """Implicit reward of a response, in nats.

        r(x, y) = β (log π_θ(y|x) − log π_ref(y|x))          DPO, arXiv 2305.18290, eq. 5 without β log Z(x)

    Args:
        policy_logps: log π_θ(y|x), summed over the response's tokens.
        ref_logps: log π_ref(y|x), likewise.
        beta: inverse strength of the KL constraint, > 0.

    Raises:
        ValueError: beta is not positive.
    """
    return _positive_beta(beta) * (policy_logps - ref_logps)


def implicit_reward_margin(
    policy_chosen: Float[np.ndarray, " pair"],
    policy_rejected: Float[np.ndarray, " pair"],
    ref_chosen: Float[np.ndarray, " pair"],
    ref_rejected: Float[np.ndarray, " pair"],
) -> Float[np.ndarray, " pair"]:
    """Implicit reward margin (IRM) of a pair, in nats and without β.

        m(x, y_w, y_l) = (1/β)(r(x, y_w) − r(x, y_l))
                       = [log π_θ(y_w|x) − log π_ref(y_w|x)] − [log π_θ(y_l|x) − log π_ref(y_l|x)]

    The quantity SeRA (arXiv 2410.09362) selects pairs by. The partition term of the reward cancels. All four
    arguments are summed log-probabilities in nats.
    """
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def length_normalised(
    logps: Float[np.ndarray, " response"], tokens: Int[np.ndarray, " response"]
) -> Float[np.ndarray, " response"]:
    """Average log-probability per token, log π(y|x) / |y|, in nats (SimPO, arXiv 2405.14734, eq. 3).

    Raises:
        ValueError: a response has no tokens.
    """
    empty = np.flatnonzero(tokens <= 0)
    if empty.size:
        raise ValueError(
            f"{empty.size} responses have no tokens (first: row {empty[0]}, tokens = {tokens[empty[0]]}), "
            "so they have no average log-probability; drop empty responses before scoring."
        )
    return logps / tokens


def length_desensitised(token_logps: Float[np.ndarray, " token"], shared: int, alpha: float) -> float:
    """The log-probability of a response in which tokens beyond the shorter one's length count less, in nats.

        log π(y_1 … y_l | x) + α log π(y_(l+1) … | x, y_1 … y_l),  l = min(|y_w|, |y_l|)          LD-DPO

    arXiv 2409.06411, as TRL computes it.

    Args:
        token_logps: log π of each token, in nats.
        shared: l, the number of tokens of the pair's shorter response.
        alpha: in [0, 1]; with 1 it is the whole sum.
    """
    return float(token_logps[:shared].sum() + alpha * token_logps[shared:].sum())


def score_responses(
    kind: str,
    policy_logps: Float[np.ndarray, " response"],
    ref_logps: Float[np.ndarray, " response"] | None,
    tokens: Int[np.ndarray, " response"],
    beta: float | int,
) -> Float[np.ndarray, " response"]:
    """Score responses for a direct-alignment algorithm; (s_w − s_l)/β is the margin for every kind.

        implicit       β (log π_θ(y|x) − log π_ref(y|x))          DPO, IPO, SLiC-HF: arXiv 2305.18290, eq. 5
        avg-implicit   β (log π_θ(y|x) − log π_ref(y|x)) / |y|    length-normalised, an option of ours
        simpo          β log π_θ(y|x) / |y|, no reference         SimPO: arXiv 2405.14734, eq. 3

    Args:
        kind: one of SCORES.
        policy_logps: log π_θ(y|x), summed, in nats.
        ref_logps: log π_ref(y|x), likewise; None for `simpo`.
        tokens: |y|, the response's length in tokens, including the end-of-turn token.
        beta: the algorithm's β, > 0.

    Raises:
        ValueError: an unknown kind, a missing or unused reference, an empty response, a beta that is not
            positive.
    """
    _one_of("score", kind, SCORES)
    if kind == "simpo":
        if ref_logps is not None:
            raise ValueError(
                "The score 'simpo' is log π(y|x)/|y| and has no reference; leave the reference out, "
                "or ask for 'implicit' or 'avg-implicit'."
            )
        return _positive_beta(beta) * length_normalised(policy_logps, tokens)
    if ref_logps is None:
        raise ValueError(
            f"The score {kind!r} is measured against a reference policy and none was given; give its "
            "log-probabilities, or ask for 'simpo'."
        )
    rewards = implicit_reward(policy_logps, ref_logps, beta)
    return length_normalised(rewards, tokens) if kind == "avg-implicit" else rewards


def ensemble_weights(kind: str, gamma: float | int, rounds: int) -> Float[np.ndarray, " policy"]:
    """Weights of the current and past policies in the reward ensemble, newest first; they add up to 1.

        last-two   r̄_t = (1 − γ) r_t + γ r_{t−1}
        mean       r̄_t = (1 − γ) r_t + γ · mean(r_0 … r_{t−1})
        ema        r̄_t = (1 − γ) r_t + γ r̄_{t−1},  r̄_0 = r_0

    Combining current and past rounds is SeRA's (arXiv 2410.09362); these three forms are ours. Policies with
    weight 0 are left out, so the length of the result is the number of policies to evaluate.

    Args:
        kind: one of ENSEMBLES.
        gamma: γ, the weight of the past, in [0, 1).
        rounds: number of policies, including the current one, >= 1.

    Raises:
        ValueError: an unknown kind, gamma outside [0, 1), fewer than one round.
    """
    _one_of("ensemble", kind, ENSEMBLES)
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma is the past round's weight and must lie in [0, 1), but is {gamma}.")
    if rounds < 1:
        raise ValueError(f"An ensemble needs at least the current policy, but rounds = {rounds}.")
    if rounds == 1 or gamma == 0:
        return np.ones(1)
    if kind == "last-two":
        return np.array([1 - gamma, gamma], dtype=np.float64)
    if kind == "mean":
        return np.concatenate([[1 - gamma], np.full(rounds - 1, gamma / (rounds - 1))])
    weights = (1 - gamma) * np.power(float(gamma), np.arange(rounds))
    weights[-1] = float(gamma) ** (rounds - 1)  # in the first round there is no past policy
    return weights


def ensemble_reward(
    values: Sequence[Float[np.ndarray, " row"]], weights: Float[np.ndarray, " policy"]
) -> Float[np.ndarray, " row"]:
    """Weighted sum of each policy's rewards, newest first: r̄ = Σ_i w_i r_i.

    Margins are linear in the rewards, so this also computes the ensemble margin from the policies' margins.

    Raises:
        ValueError: not one array of values for each weight.
    """
    if len(values) != len(weights):
        raise ValueError(
            f"The ensemble has {len(weights)} weights but {len(values)} policies' values; "
            "give one array for each weight, newest first."
        )
    total = weights[0] * values[0]
    # Summed one by one, newest first: a fixed order gives the same bytes on every machine.
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def quantise(values: Float[np.ndarray, "*shape"], step: float = 1e-6) -> Float[np.ndarray, "*shape"]:
    """Round to a multiple of `step` nats, so that selection and pairing do not depend on the last bits.

    Minus zero becomes zero; values that are not finite stay unchanged.

    Raises:
        ValueError: step is not one over a whole number (only then is the rounded value the nearest float64).
    """
    per_nat = np.rint(1 / step) if step > 0 else 0.0
    if per_nat < 1 or not np.isclose(per_nat * step, 1, rtol=1e-12, atol=0):
        raise ValueError(f"step must be one over a whole number of steps a nat, such as 1e-6, but is {step}.")
    return np.rint(values * per_nat) / per_nat + 0.0


def penalty_grid(
    rewards: Float[np.ndarray, " response"], tokens: Int[np.ndarray, " response"], n: int = 41
) -> Float[np.ndarray, " alpha"]:
    """Length penalties α to try, in reward per token: n values, evenly spaced around 0 and including it.

    The grid ends at twice std(reward)/std(tokens). The slope of a regression of reward on length is at most
    std/std, so the grid contains the α that removes the linear effect of length. The scale is ours. If all
    responses have the same length, the grid is [0].

    Raises:
        ValueError: n is even or below 3.
    """
    if n < 3 or n % 2 == 0:
        raise ValueError(f"The grid must have an odd number of points, at least 3, to hold 0, but n = {n}.")
    spread = tokens.std() if tokens.size else 0.0
    if spread == 0:
        return np.zeros(1)
    half = n // 2
    return np.arange(-half, half + 1) / half * (2 * rewards.std() / spread)


def length_penalty_sweep(
    rewards: Float[np.ndarray, " response"],
    tokens: Int[np.ndarray, " response"],
    groups: Int[np.ndarray, " response"],
    alphas: Float[np.ndarray, " alpha"],
) -> Float[np.ndarray, " alpha"]:
    """Mean over groups of |best| − |worst| in tokens, under DICE's score s − α|y| (arXiv 2406.09760).

    A group is a prompt with its responses, or a human pair (two responses). Groups of one response do not
    count. If several responses tie for best or worst, the mean of their lengths is used.

    Raises:
        ValueError: no group has two responses.
    """
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    if not (sizes >= 2).any():
        raise ValueError(
            "No group has two responses, so no length difference can be measured; sample at least two "
            "responses a prompt, or turn the length penalty off."
        )
    length = tokens[order].astype(np.float64)
    sorted_rewards = rewards[order]

    def mean_difference(alpha: float) -> float:
        score = sorted_rewards - alpha * length
        best = _mean_length_at(score, np.maximum.reduceat(score, starts), length, starts, sizes)
        worst = _mean_length_at(score, np.minimum.reduceat(score, starts), length, starts, sizes)
        return float((best - worst)[sizes >= 2].mean())

    return np.array([mean_difference(alpha) for alpha in alphas], dtype=np.float64)


def nearest_zero(alphas: Float[np.ndarray, " alpha"], sweep: Float[np.ndarray, " alpha"]) -> float:
    """The penalty whose mean length difference is nearest zero; ties: the smallest |α|, then the larger α.

    A penalty that leaves no pair has the difference nan and comes last.
    """
    choice = np.lexsort((-alphas, np.abs(alphas), np.abs(sweep)))[0]
    return float(alphas[choice])


def _mean_length_at(
    score: Float[np.ndarray, " response"],
    extreme: Float[np.ndarray, " group"],
    length: Float[np.ndarray, " response"],
    starts: Int[np.ndarray, " group"],
    sizes: Int[np.ndarray, " group"],
) -> Float[np.ndarray, " group"]:
    """Mean length of the responses whose score is their group's extreme."""
    at = (score == np.repeat(extreme, sizes)).astype(np.float64)
    return np.add.reduceat(at * length, starts) / np.add.reduceat(at, starts)


def _positive_beta(beta: float | int) -> float:
    if not beta > 0:
        raise ValueError(
            f"beta is the inverse strength of the KL constraint and must be positive, but is {beta}."
        )
    return float(beta)


def _one_of(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"The {what} {name!r} is unknown; choose one of {', '.join(names)}.")
