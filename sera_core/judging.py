"""From stored log-probabilities to rewards, margins and the ledger of a selection.

The one place where policies, references and ensembles meet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.errors import SeraError
from sera_core.noise import Noise, response_noise
from sera_core.rewards import (
    ensemble_reward,
    fit_length_penalty,
    penalty_grid,
    quantise,
    score_responses,
)
from sera_core.selection import Selection

Nats = np.ndarray
NOISE = "margin_noise_nats"
"""Metric of a review: what a human pair's margin stays below by noise alone; `…_generated` of a pairing."""


@dataclass(frozen=True)
class Judgement:
    """Rewards of responses under the newest policy, and under the ensemble (which orders pairs)."""

    reward: Nats
    ensemble: Nats
    penalty: dict[str, Any] | None
    """DICE's sweep: alphas (nats a token), mean length differences (tokens), and the alpha taken."""


def judge_responses(
    score: str,
    beta: float,
    weights: Sequence[float],
    policies: Sequence[Nats],
    references: Sequence[Nats],
    tokens: np.ndarray,
    groups: np.ndarray,
    length_penalty: str,
) -> Judgement:
    """Rewards β·s of every response, rounded to 1e-6 nats, newest policy first (METHOD, quantities 1 to 5).

    Args:
        score: one of `rewards.SCORES`.
        beta: inverse strength of the KL constraint.
        weights: weight of each policy's reward, newest first.
        policies: log π_k(y|x) for each policy, in nats.
        references: log π_ref,k(y|x) likewise; empty for simpo.
        tokens: length of each response in tokens.
        groups: responses that compete (a prompt, or a human pair) share a number.
        length_penalty: `none`, or `dice` (fitted on the ensemble's rewards).
    """
    refs: Sequence[Nats | None] = references or [None] * len(policies)
    rewards = [
        score_responses(score, policy, ref, tokens, beta) for policy, ref in zip(policies, refs, strict=True)
    ]
    ensemble = ensemble_reward(rewards, np.asarray(weights))
    penalty = None
    if length_penalty == "dice":
        penalty, slope = _fit_penalty(ensemble, tokens, groups)
        rewards[0], ensemble = rewards[0] - slope * tokens, ensemble - slope * tokens
    return Judgement(quantise(rewards[0]), quantise(ensemble), penalty)


def _fit_penalty(rewards: Nats, tokens: np.ndarray, groups: np.ndarray) -> tuple[dict[str, Any], float]:
    if len(rewards) == 0:
        return {"alpha": 0.0, "alphas": [], "length_differences": []}, 0.0
    alphas = penalty_grid(rewards, tokens)
    alpha, sweep = fit_length_penalty(rewards, tokens, groups, alphas)
    return {"alpha": alpha, "alphas": alphas.tolist(), "length_differences": sweep.tolist()}, alpha


def probed_noise(
    score: str,
    beta: float,
    weights: Sequence[float],
    ids: Sequence[str],
    policies: Sequence[Nats],
    references: Sequence[Nats],
    probes: Mapping[str, pa.Table],
) -> Noise:
    """The noise in a response's ensemble reward, in nats without β.

    Args:
        score, beta, weights: as in `judge_responses`.
        ids: key of each response.
        policies: log π_k(y|x) as the ensemble reads them, newest first.
        references: log π_ref,k(y|x) likewise; empty for simpo.
        probes: the same of a few responses in float32, tables of id, logps and tokens by name:
            `exact-policy-000`, … and `exact-ref-000`, …; empty where nothing was probed.

    Raises:
        SeraError: a probe is of other responses.
    """
    if not probes:
        return Noise(0.0, 0)
    first = next(iter(probes.values()))
    probed = first["id"].to_pylist()
    places = dict.fromkeys(probed)
    places |= {id: row for row, id in enumerate(ids) if id in places}
    if None in places.values() or any(table["id"] != first["id"] for table in probes.values()):
        raise SeraError("the noise probe is of other responses than those reviewed; delete that step")
    tokens = first["tokens"].to_numpy().astype(np.int64)
    rows = np.array([places[id] for id in probed], dtype=np.int64)

    def ensemble(policy_logps: Sequence[Nats], reference_logps: Sequence[Nats]) -> Nats:
        refs: Sequence[Nats | None] = reference_logps or [None] * len(policy_logps)
        rewards = [
            score_responses(score, policy, ref, tokens, beta)
            for policy, ref in zip(policy_logps, refs, strict=True)
        ]
        return ensemble_reward(rewards, np.asarray(weights))

    exact = {name: table["logps"].to_numpy() for name, table in sorted(probes.items())}
    used = ensemble([values[rows] for values in policies], [values[rows] for values in references])
    again = ensemble(
        [values for name, values in exact.items() if "policy" in name],
        [values for name, values in exact.items() if "ref" in name],
    )
    return response_noise(used / beta, again / beta)


def interleaved(table: pa.Table) -> tuple[Nats, Nats]:
    """(chosen, rejected) log-probabilities of a logps table of pairs, whose rows alternate."""
    values = table["logps"].to_numpy()
    return values[0::2], values[1::2]


def scored_table(
    pair_ids: Sequence[str],
    policy: tuple[Nats, Nats],
    reference: tuple[Nats, Nats] | None,
    tokens: tuple[np.ndarray, np.ndarray],
    reward: tuple[Nats, Nats],
    ensemble: tuple[Nats, Nats],
    beta: float,
) -> pa.Table:
    """The columns of scored.parquet; margins are in nats without β. Each tuple is (chosen, rejected)."""
    columns = {
        "pair_id": list(pair_ids),
        "policy_chosen_logps": policy[0],
        "policy_rejected_logps": policy[1],
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
        "chosen_reward": reward[0],
        "rejected_reward": reward[1],
        "margin": quantise((reward[0] - reward[1]) / beta),
        "ensemble_margin": quantise((ensemble[0] - ensemble[1]) / beta),
    }
    if reference is not None:
        columns |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return schema.table(schema.SCORED, columns)


def selection_table(
    pair_ids: Sequence[str],
    prompt_ids: Sequence[str | None],
    margins: Nats,
    selection: Selection,
    origin: str,
    round: int,
) -> pa.Table:
    """The ledger of one selection: each pair's margin in nats, its rank, kept or dropped, and why."""
    rows = len(pair_ids)
    reasons = zip(selection.swapped, selection.reason, strict=True)
    columns = {
        "pair_id": list(pair_ids),
        "prompt_id": list(prompt_ids),
        "origin": [origin] * rows,
        "round": [round] * rows,
        "stage": ["select"] * rows,
        "ensemble_margin": margins,
        "rank": [int(rank) or None for rank in selection.rank],
        "kept": selection.kept,
        "reason": ["relabelled" if turned else str(reason) for turned, reason in reasons],
    }
    return schema.table(schema.LEDGER, columns)
