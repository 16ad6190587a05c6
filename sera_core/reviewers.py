"""Compute rewards, margins and the selection's ledger from stored log-probabilities.

The only place that combines policies, references and ensembles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.data.splitting import group_key
from sera_core.errors import SeraError
from sera_core.method.noise import Noise, response_noise
from sera_core.method.rewards import (
    ensemble_reward,
    length_penalty_sweep,
    nearest_zero,
    penalty_grid,
    quantise,
    score_responses,
)
from sera_core.method.selection import Selection, select

Nats = np.ndarray
Sweep = Callable[[Nats], float]
"""sweep(rewards): mean length difference, in tokens, of the pairs these rewards would give; nan if none."""
RowsOf = Callable[[pa.ChunkedArray], np.ndarray]
"""rows_of(keys): the row of each response among all, int64; -1 for one that is not there."""
NOISE = "margin_noise_nats"
"""Metric of a review: noise floor of a human pair's margin, in nats; `…_generated` for generated pairs."""


@dataclass(frozen=True)
class Judgement:
    """Rewards of responses under the newest policy, and under the ensemble (used to rank pairs)."""

    reward: Nats
    ensemble: Nats
    penalty: dict[str, Any] | None
    """DICE's sweep: alphas (nats per token), mean length differences (tokens), and the chosen alpha."""


def judge_responses(
    score: str,
    beta: float,
    weights: Sequence[float],
    policies: Sequence[Nats],
    references: Sequence[Nats],
    tokens: np.ndarray,
    sweep: Sweep | None = None,
) -> Judgement:
    """Rewards β·s of every response, newest policy first.

    Scores are rounded without β (to 1e-6 nats; per-token averages to 1e-9), so that ties and margins do not
    depend on the last bits or on β.

    Args:
        score: one of `rewards.SCORES`.
        beta: inverse strength of the KL constraint.
        weights: weight of each policy's reward, newest first.
        policies: log π_k(y|x) for each policy, in nats.
        references: log π_ref,k(y|x) likewise; empty for simpo.
        tokens: length of each response in tokens.
        sweep: the function that DICE's length penalty is fitted with (`sweep_of_responses`,
            `sweep_of_pairs`); None for no penalty.
    """
    refs: Sequence[Nats | None] = references or [None] * len(policies)
    rewards = [
        score_responses(score, policy, ref, tokens, beta) for policy, ref in zip(policies, refs, strict=True)
    ]
    ensemble = ensemble_reward(rewards, np.asarray(weights))
    penalty = None
    if sweep is not None:
        penalty = _fit_penalty(ensemble, tokens, sweep)
        slope = penalty["alpha"]
        rewards[0], ensemble = rewards[0] - slope * tokens, ensemble - slope * tokens
    step = rounding(score)
    return Judgement(
        beta * quantise(rewards[0] / beta, step), beta * quantise(ensemble / beta, step), penalty
    )


def rounding(score: str) -> float:
    """Rounding step of a score without β, in nats: of a sum over tokens, or of a per-token average."""
    return 1e-6 if score == "implicit" else 1e-9


def _fit_penalty(rewards: Nats, tokens: np.ndarray, sweep: Sweep) -> dict[str, Any]:
    """DICE's penalty α (arXiv 2406.09760): the one with the mean length difference nearest zero."""
    finite = np.isfinite(rewards)
    alphas = penalty_grid(rewards[finite], tokens[finite]) if finite.any() else np.zeros(1)
    differences = np.array([sweep(rewards - alpha * tokens) for alpha in alphas], dtype=np.float64)
    finite_differences = [None if np.isnan(value) else value for value in differences.tolist()]
    return {
        "alpha": nearest_zero(alphas, differences),
        "alphas": alphas.tolist(),
        "length_differences": finite_differences,
    }


def sweep_of_responses(tokens: np.ndarray, prompts: np.ndarray, usable: np.ndarray) -> Sweep:
    """Mean of |best| − |worst| in tokens over prompts, for the responses that may be paired.

    Args:
        tokens: length of each response.
        prompts: number of each response's prompt.
        usable: which may be paired; responses without a finite reward are excluded too.
    """

    def difference(rewards: Nats) -> float:
        rows = usable & np.isfinite(rewards)
        if not rows.any() or np.unique(prompts[rows], return_counts=True)[1].max() < 2:
            return float("nan")
        return float(length_penalty_sweep(rewards[rows], tokens[rows], prompts[rows], np.zeros(1))[0])

    return difference


def sweep_of_pairs(
    tokens: np.ndarray, pair_ids: Sequence[str] | np.ndarray, beta: float, rules: Mapping[str, Any], seed: int
) -> Sweep:
    """Mean of |y_w| − |y_l| in tokens over the human pairs that the selection would keep.

    The labels are fixed, so a penalty can only change which pairs are kept.

    Args:
        tokens: length of each response, chosen and rejected in turn.
        rules: arguments of `select`, including its rule.
        seed: seed of the selection.
    """

    def difference(rewards: Nats) -> float:
        margins = quantise((rewards[0::2] - rewards[1::2]) / beta)
        kept = select(margins, pair_ids, seed=seed, **rules).kept
        lengths = (tokens[0::2] - tokens[1::2])[kept]
        return float(lengths.mean()) if lengths.size else float("nan")

    return difference


def probed_noise(
    score: str,
    beta: float,
    weights: Sequence[float],
    rows_of: RowsOf,
    policies: Sequence[Nats],
    references: Sequence[Nats],
    probes: Mapping[str, pa.Table],
) -> Noise:
    """The noise in a response's ensemble reward, in nats without β.

    Args:
        score, beta, weights: as in `judge_responses`.
        rows_of: finds the probed responses among all.
        policies: log π_k(y|x) of the ensemble's policies, newest first.
        references: log π_ref,k(y|x) likewise; empty for simpo.
        probes: the same for a few responses in float32, tables of id, logps and tokens by name:
            `exact-policy-000`, … and `exact-ref-000`, …; empty if there is no probe.

    Raises:
        SeraError: a probe has other responses.
    """
    if not probes:
        return Noise(0.0, 0)
    first = next(iter(probes.values()))
    rows = rows_of(first["id"])
    if (rows < 0).any() or any(table["id"] != first["id"] for table in probes.values()):
        raise SeraError("the noise probe has other responses than the review; delete that step and run again")
    tokens = first["tokens"].to_numpy().astype(np.int64)

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


def prompt_groups(pairs: Path, pair_ids: Sequence[str]) -> np.ndarray:
    """Number of each pair's prompt group (as in the split); pairs of one group are not independent.

    Args:
        pairs: a file with the columns `pair_id` and `prompt` and all the pairs.
        pair_ids: the pairs, in output order.
    """
    return numbered_groups(prompt_keys(pairs, pair_ids))


def prompt_keys(pairs: Path, pair_ids: Sequence[str]) -> list[str]:
    """Key of each pair's prompt group (`data.splitting.group_key`): the same in every run on the data.

    Args:
        pairs, pair_ids: as in `prompt_groups`.
    """
    keys = {
        row["pair_id"]: group_key(row["prompt"]) for row in schema.iter_rows(pairs, ["pair_id", "prompt"])
    }
    return [keys[id] for id in pair_ids]


def numbered_groups(keys: Sequence[str]) -> np.ndarray:
    """A number for each key, from 0 in the order of first occurrence; equal keys share theirs."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def interleaved(table: pa.Table) -> tuple[Nats, Nats]:
    """(chosen, rejected) log-probabilities from a logps table of pairs, whose rows alternate."""
    values = table["logps"].to_numpy()
    return values[0::2], values[1::2]


def scored_table(
    pair_ids: Sequence[str] | np.ndarray | pa.ChunkedArray,
    policy: tuple[Nats, Nats],
    reference: tuple[Nats, Nats] | None,
    tokens: tuple[np.ndarray, np.ndarray],
    reward: tuple[Nats, Nats],
    ensemble: tuple[Nats, Nats],
    beta: float,
    step: float = 1e-6,
) -> pa.Table:
    """The columns of scored.parquet; margins are in nats without β, rounded to step. Each tuple is (chosen,
    rejected)."""
    columns = {
        "pair_id": pair_ids,
        "policy_chosen_logps": policy[0],
        "policy_rejected_logps": policy[1],
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
        "chosen_reward": reward[0],
        "rejected_reward": reward[1],
        "margin": quantise((reward[0] - reward[1]) / beta, step),
        "ensemble_margin": quantise((ensemble[0] - ensemble[1]) / beta, step),
    }
    if reference is not None:
        columns |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return schema.table(schema.SCORED, columns)


def selection_table(
    pair_ids: Sequence[str] | pa.ChunkedArray,
    prompt_ids: Sequence[str | None] | pa.ChunkedArray,
    margins: Nats,
    selection: Selection,
    origin: str,
    round: int,
) -> pa.Table:
    """The ledger of one selection: each pair's margin in nats, its rank, kept or dropped, and why."""
    rows = len(pair_ids)
    reason = selection.reason
    if selection.swapped.any():
        reason = np.where(selection.swapped, np.asarray("relabelled", dtype=object), reason)
    columns = {
        "pair_id": pair_ids,
        "prompt_id": prompt_ids,
        "origin": pa.repeat(origin, rows),
        "round": pa.repeat(round, rows),
        "stage": pa.repeat("select", rows),
        "ensemble_margin": margins,
        "rank": pa.array(selection.rank, mask=selection.rank == 0),
        "kept": selection.kept,
        "reason": reason,
    }
    return schema.table(schema.LEDGER, columns)
