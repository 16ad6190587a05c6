"""Make preference pairs from sampled responses: choose the chosen and rejected response of each prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.errors import InputError
from sera_core.extensions import Registry, is_own

ANCHORED = "best-anchored"
"""The pairing rule that rejects responses of the run's start policy."""


@dataclass(frozen=True)
class Pairing:
    """The pairs, prompts ascending, and the outcome of each prompt."""

    chosen: Int[np.ndarray, " pair"]
    """Row of the chosen response."""
    rejected: Int[np.ndarray, " pair"]
    """Row of the rejected response."""
    prompts: Int[np.ndarray, " prompt"]
    """All prompts, ascending."""
    prompt_reason: np.ndarray
    """Each one's: `paired`, `no_valid_response`, `one_distinct_response`, `tie` (all rewards are equal), or
    `anchor_not_below` (no response of the start policy has a smaller reward than the policy's best)."""


def pair_responses(
    rewards: Float[np.ndarray, " response"],
    prompt_index: Int[np.ndarray, " response"],
    sample: Int[np.ndarray, " response"],
    distinct: Int[np.ndarray, " response"],
    valid: Bool[np.ndarray, " response"],
    *,
    rule: str,
    seeds: Mapping[int, int] | Int[np.ndarray, " seed"] | None = None,
    prompts: Int[np.ndarray, " prompt"] | None = None,
) -> Pairing:
    """Pair each prompt's responses by their (ensemble) reward.

    | rule             | chosen   | rejected                                                                |
    |------------------|----------|-------------------------------------------------------------------------|
    | `best-worst`     | argmax r | argmin r (as in SeRA's loop, arXiv 2410.09362: at most a pair a prompt) |
    | `best-random`    | argmax r | drawn by the prompt's own seed from those strictly below the best       |
    | `best-mu-2sigma` | argmax r | of those strictly below the best, nearest μ − 2σ (arXiv 2502.16825)     |
    | `all`            | every r  | every response of the prompt with a strictly smaller r                  |
    | `module:name`    | what the user's own rule says, prompt by prompt (see `sera_core.extensions`)       |

    Responses with the same token ids count as one, with the smallest sample number. Ties of the reward go to
    the smaller sample number. μ and the population σ are over all valid samples, including repeated ones, as
    they estimate the policy's distribution. Rewards are compared exactly: round them first. Tied responses
    make no pair.

    Args:
        rewards: r̄(x, y), in nats; read only where `valid`.
        prompt_index: number of each response's prompt; need not be contiguous or sorted.
        sample: the response's number among its prompt's samples.
        distinct: equal for responses of one prompt with the same token ids.
        valid: False where a response may not be used (empty, cut by the length limit, not finite).
        seeds: for `best-random`, a seed per prompt number.
        prompts: all prompts to report on; default: those with a response.

    Raises:
        ValueError: an unknown rule, a valid response with a reward that is not finite, a seed that is
            missing.
    """
    choose = PAIRING.named(rule)
    _check(rewards, prompt_index, valid, rule, seeds, prompts)
    prompts = np.unique(prompt_index if prompts is None else prompts)
    rows = _first_of_each(prompt_index, sample, distinct, valid)
    # From here on, rows are grouped by prompt, best first, ties by sample number.
    rows = rows[np.lexsort((sample[rows], -rewards[rows], prompt_index[rows]))]
    present, starts, sizes = np.unique(prompt_index[rows], return_index=True, return_counts=True)
    lowest = rewards[rows[starts + sizes - 1]]
    differs = rewards[rows[starts]] > lowest

    reason = np.full(prompts.size, "no_valid_response", dtype=object)
    one_or_tie = np.where(sizes < 2, "one_distinct_response", "tie")
    reason[np.searchsorted(prompts, present)] = np.where(differs, "paired", one_or_tie)

    starts, sizes = starts[differs], sizes[differs]
    groups = Groups(rewards, prompt_index, sample, valid, seeds, rows, starts, sizes)
    chosen, rejected = _own(choose, rule, groups) if is_own(rule) else choose(groups)
    return Pairing(chosen, rejected, prompts, reason)


def pair_with_anchors(
    rewards: Float[np.ndarray, " response"],
    prompt_index: Int[np.ndarray, " response"],
    sample: Int[np.ndarray, " response"],
    valid: Bool[np.ndarray, " response"],
    anchor: Bool[np.ndarray, " response"],
    prompts: Int[np.ndarray, " prompt"],
) -> Pairing:
    """Pair each prompt's best response of the policy with the worst of the start policy.

        chosen = argmax over the policy's r,  rejected = argmin over the start policy's r

    Anchored rejection (arXiv 2508.06026, read second-hand): as the policy improves, the worst of its own
    responses comes near the best, while those of the start policy stay where they are. Ties go to the smaller
    sample number.

    Args:
        rewards, prompt_index, sample, valid, prompts: as in `pair_responses`.
        anchor: whether the start policy gave the response.

    Raises:
        ValueError: as `pair_responses`.
    """
    _check(rewards, prompt_index, valid, ANCHORED, None, prompts)
    own, others = np.flatnonzero(valid & ~anchor), np.flatnonzero(valid & anchor)
    best = _first_by(own, prompt_index, sample, -rewards[own])
    worst = _first_by(others, prompt_index, sample, rewards[others])
    both, at_best, at_worst = np.intersect1d(prompt_index[best], prompt_index[worst], return_indices=True)
    best, worst = best[at_best], worst[at_worst]
    above = rewards[best] > rewards[worst]
    reason = np.full(prompts.size, "no_valid_response", dtype=object)
    reason[np.searchsorted(prompts, both)] = np.where(above, "paired", "anchor_not_below")
    return Pairing(best[above], worst[above], prompts, reason)


def sampled_policies(rule: str) -> int:
    """How many policies answer each prompt: two where the start policy's responses are rejected."""
    return 2 if rule == ANCHORED else 1


def expected_pairs(rule: str, responses: int) -> int:
    """Pairs that a prompt gives if all its `responses` differ in text and reward.

    A rule of the user's own may give any number; it is taken to give one.
    """
    return responses * (responses - 1) // 2 if rule == "all" else 1


@dataclass(frozen=True)
class Groups:
    """The responses of the prompts that can be paired, as a rule sees them."""

    rewards: Float[np.ndarray, " response"]
    prompt_index: Int[np.ndarray, " response"]
    sample: Int[np.ndarray, " response"]
    valid: Bool[np.ndarray, " response"]
    seeds: Mapping[int, int] | Int[np.ndarray, " seed"] | None
    rows: Int[np.ndarray, " row"]
    """Distinct valid responses, prompt by prompt, the best first."""
    starts: Int[np.ndarray, " paired"]
    """Where in `rows` each prompt with two different rewards begins."""
    sizes: Int[np.ndarray, " paired"]

    @property
    def best(self) -> Int[np.ndarray, " paired"]:
        """Row of each prompt's best response."""
        return self.rows[self.starts]

    @property
    def below(self) -> Int[np.ndarray, " below"]:
        """Rows whose reward is strictly below their prompt's best."""
        return _below_best(self.rewards, self.rows, self.starts, self.sizes)


Rows = tuple[np.ndarray, np.ndarray]
"""Rows of the chosen and of the rejected responses."""


def _best_worst(g: Groups) -> Rows:
    return g.best, _first_by(g.below, g.prompt_index, g.sample, g.rewards[g.below])


def _best_random(g: Groups) -> Rows:
    return g.best, _drawn(g.rewards, g.prompt_index, g.rows, g.starts, g.sizes, g.seeds)


def _best_mu_2sigma(g: Groups) -> Rows:
    target = _mu_minus_two_sigma(g.rewards, g.prompt_index, g.valid)
    return g.best, _first_by(g.below, g.prompt_index, g.sample, np.abs(g.rewards[g.below] - target[g.below]))


def _all(g: Groups) -> Rows:
    return _every_pair(g.rewards, g.rows, g.starts, g.sizes)


PAIRING: Registry[Callable[[Groups], Rows]] = Registry(
    "pairing rule",
    {
        "best-worst": _best_worst,
        "best-random": _best_random,
        "best-mu-2sigma": _best_mu_2sigma,
        "all": _all,
    },
)
PAIRING_RULES = tuple(PAIRING.entries)


def _own(rule: Callable[..., Any], name: str, g: Groups) -> Rows:
    """The user's own rule, prompt by prompt; a pair must prefer the response with the larger reward."""
    chosen, rejected = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start, size in zip(g.starts, g.sizes, strict=True):
        members = g.rows[start : start + size]
        rewards = g.rewards[members]
        returned = np.asarray(list(rule(rewards.copy())), dtype=np.int64).reshape(-1, 2)
        inside = bool(((returned >= 0) & (returned < size)).all())
        if not inside or not (rewards[returned[:, 0]] > rewards[returned[:, 1]]).all():
            raise InputError(
                f"the pairing rule {name!r} gave {returned.tolist()} for rewards {rewards.tolist()}: each "
                "pair is two places in that list, and the first has the larger reward"
            )
        chosen.append(members[returned[:, 0]])
        rejected.append(members[returned[:, 1]])
    return np.concatenate(chosen), np.concatenate(rejected)


def _first_of_each(
    prompt_index: Int[np.ndarray, " response"],
    sample: Int[np.ndarray, " response"],
    distinct: Int[np.ndarray, " response"],
    valid: Bool[np.ndarray, " response"],
) -> Int[np.ndarray, " row"]:
    """Rows of the distinct valid responses; of equal ones, the one with the smallest sample number."""
    rows = np.flatnonzero(valid)
    rows = rows[np.lexsort((sample[rows], distinct[rows], prompt_index[rows]))]
    same = (np.diff(prompt_index[rows]) == 0) & (np.diff(distinct[rows]) == 0)
    return rows[np.concatenate([np.ones(min(rows.size, 1), dtype=bool), ~same])]


def _below_best(
    rewards: Float[np.ndarray, " response"],
    rows: Int[np.ndarray, " row"],
    starts: Int[np.ndarray, " paired"],
    sizes: Int[np.ndarray, " paired"],
) -> Int[np.ndarray, " below"]:
    """Rows whose reward is strictly below their prompt's best."""
    offset = np.repeat(np.cumsum(sizes) - sizes, sizes)
    inside = np.arange(sizes.sum()) - offset + np.repeat(starts, sizes)
    members = rows[inside]
    return members[rewards[members] < np.repeat(rewards[rows[starts]], sizes)]


def _first_by(
    rows: Int[np.ndarray, " below"],
    prompt_index: Int[np.ndarray, " response"],
    sample: Int[np.ndarray, " response"],
    key: Float[np.ndarray, " below"],
) -> Int[np.ndarray, " paired"]:
    """For each prompt, ascending, the row with the smallest key; ties by sample number."""
    rows = rows[np.lexsort((sample[rows], key, prompt_index[rows]))]
    return rows[np.unique(prompt_index[rows], return_index=True)[1]]


def _mu_minus_two_sigma(
    rewards: Float[np.ndarray, " response"],
    prompt_index: Int[np.ndarray, " response"],
    valid: Bool[np.ndarray, " response"],
) -> Float[np.ndarray, " response"]:
    """μ − 2σ of the valid rewards of each response's prompt, in nats."""
    _, inverse = np.unique(prompt_index, return_inverse=True)
    kept = np.where(valid, rewards, 0.0)
    count = np.maximum(np.bincount(inverse, weights=valid), 1)
    mean = np.bincount(inverse, weights=kept) / count
    squares = np.bincount(inverse, weights=np.where(valid, (kept - mean[inverse]) ** 2, 0.0))
    return (mean - 2 * np.sqrt(squares / count))[inverse]


def _drawn(
    rewards: Float[np.ndarray, " response"],
    prompt_index: Int[np.ndarray, " response"],
    rows: Int[np.ndarray, " row"],
    starts: Int[np.ndarray, " paired"],
    sizes: Int[np.ndarray, " paired"],
    seeds: Mapping[int, int] | Int[np.ndarray, " seed"] | None,
) -> Int[np.ndarray, " paired"]:
    """One row below the best for each prompt, drawn by the prompt's own seed."""
    drawn = np.empty(starts.size, dtype=np.int64)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        members = rows[start : start + size]
        below = members[rewards[members] < rewards[members[0]]]
        seed = int(seeds[int(prompt_index[members[0]])])  # type: ignore[index]
        drawn[i] = below[np.random.default_rng(seed).integers(below.size)]
    return drawn


def _every_pair(
    rewards: Float[np.ndarray, " response"],
    rows: Int[np.ndarray, " row"],
    starts: Int[np.ndarray, " paired"],
    sizes: Int[np.ndarray, " paired"],
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """Every ordered pair of a prompt's rows with a strictly larger first reward, the best chosen first."""
    chosen, rejected = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for start, size in zip(starts, sizes, strict=True):
        members = rows[start : start + size]
        better, worse = np.nonzero(rewards[members][:, None] > rewards[members][None, :])
        chosen.append(members[better])
        rejected.append(members[worse])
    return np.concatenate(chosen), np.concatenate(rejected)


def _check(
    rewards: Float[np.ndarray, " response"],
    prompt_index: Int[np.ndarray, " response"],
    valid: Bool[np.ndarray, " response"],
    rule: str,
    seeds: Mapping[int, int] | Int[np.ndarray, " seed"] | None,
    prompts: Int[np.ndarray, " prompt"] | None,
) -> None:
    bad = np.flatnonzero(valid & ~np.isfinite(rewards))
    if bad.size:
        raise ValueError(
            f"{bad.size} valid responses have a reward that is not finite (first: row {bad[0]}, reward "
            f"{rewards[bad[0]]}); mark them invalid and record the reason non_finite."
        )
    if rule == "best-random" and seeds is None:
        raise ValueError(
            "The pairing rule 'best-random' draws and needs a seed for each prompt; give `seeds`."
        )
    if prompts is not None and not np.isin(prompt_index, prompts).all():
        raise ValueError(
            "Some responses belong to prompts that are not among `prompts`; list every prompt there."
        )
