"""Score human pairs with the policy's log-probabilities, and select pairs by margin."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.manifest import StepRecord
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import numbers, strings
from sera_core.errors import SeraError
from sera_core.method.noise import noise_floor
from sera_core.method.rewards import score_responses
from sera_core.method.selection import BY_VARIANCE, prompt_variance, select
from sera_core.reviewers import (
    NOISE,
    Sweep,
    interleaved,
    judge_responses,
    probed_noise,
    rounding,
    scored_table,
    selection_table,
    sweep_of_pairs,
)
from sera_core.steps import FOLD

_SETTINGS = ("fraction", "k", "threshold", "min_margin", "direction")


def review_pairs(attempt: Attempt) -> list[str]:
    """Write scored.parquet: rewards, margins and ensemble margins of every pair, in input order."""
    fields = attempt.fields
    pairs = schema.read_table(attempt.input("pairs").path(fields["file"]), schema.PAIRS)
    policies = [_logps(attempt, name, pairs) for name in _names(attempt, "policy-")]
    references = [_logps(attempt, name, pairs) for name in _names(attempt, "reference-")]
    tokens = policies[0]["tokens"].to_numpy()
    judged = judge_responses(
        fields["score"],
        fields["beta"],
        fields["weights"],
        [table["logps"].to_numpy() for table in policies],
        [table["logps"].to_numpy() for table in references],
        tokens,
        _sweep(attempt, pairs["pair_id"].to_pylist(), tokens),
    )
    noise = probed_noise(
        fields["score"],
        fields["beta"],
        fields["weights"],
        policies[0]["id"].to_pylist(),
        [table["logps"].to_numpy() for table in policies],
        [table["logps"].to_numpy() for table in references],
        _probes(attempt, pairs),
    )
    attempt.metrics[NOISE] = round(noise_floor(noise, 2), 6)
    if "head_mixture" in attempt.spec.inputs:
        attempt.metrics |= _memory(attempt, pairs, policies[0], references[0] if references else None)
    scored = scored_table(
        pairs["pair_id"].to_pylist(),
        interleaved(policies[0]),
        interleaved(references[0]) if references else None,
        (tokens[0::2], tokens[1::2]),
        (judged.reward[0::2], judged.reward[1::2]),
        (judged.ensemble[0::2], judged.ensemble[1::2]),
        fields["beta"],
        rounding(fields["score"]),
    )
    schema.write_table(scored, attempt.write("scored.parquet"))
    attempt.counts["pairs"] = scored.num_rows
    if judged.penalty is None:
        return ["scored.parquet"]
    attempt.metrics["length_penalty/alpha"] = judged.penalty["alpha"]
    attempt.write("length_penalty.json").write_text(json.dumps(judged.penalty, indent=1) + "\n")
    return ["scored.parquet", "length_penalty.json"]


def select_pairs(attempt: Attempt) -> list[str]:
    """Write ledger.parquet: rank, kept or dropped, and reason of each scored pair."""
    fields = attempt.fields
    scored = schema.read_table(attempt.input("review").path("scored.parquet"), schema.SCORED)
    prompts = _prompt_ids(attempt)
    ids = scored["pair_id"].to_pylist()
    margins = scored["ensemble_margin"].to_numpy()
    settings: dict[str, Any] = {name: fields[name] for name in _SETTINGS if name in fields}
    if "seed" in fields:
        settings["seed"] = derived_seed(fields["seed"], fields["round"], fields["origin"], "random")
    noise = _noise(attempt.input("review").record)
    if settings.get("min_margin", -np.inf) > -np.inf:
        settings["min_margin"] = attempt.metrics["floor_nats"] = max(settings["min_margin"], noise)
    if fields["rule"] == BY_VARIANCE:
        settings["variance"] = _variances(attempt, [prompts[pair] for pair in ids])
    selection = select(margins, ids, rule=fields["rule"], **settings)
    ledger = selection_table(
        ids, [prompts[pair] for pair in ids], margins, selection, fields["origin"], fields["round"]
    )
    schema.write_table(ledger, attempt.write("ledger.parquet"))
    attempt.counts.update(ledger["reason"].to_pylist())
    return ["ledger.parquet"]


def _variances(attempt: Attempt, prompts: Sequence[str]) -> np.ndarray:
    """The variance of preferences between all responses to each pair's prompt."""
    path = attempt.input("review").path("responses.parquet")
    kinds, index = np.unique(strings(path, schema.RESPONSES, "prompt_id"), return_inverse=True)
    found = prompt_variance(numbers(path, schema.RESPONSES, "ensemble_reward"), index)
    return found[np.searchsorted(kinds, np.array(prompts, dtype=kinds.dtype))]


def _prompt_ids(attempt: Attempt) -> dict[str, str]:
    pairs = attempt.input("pairs")
    name = "train.parquet" if "train.parquet" in pairs.record.files else "pairs.parquet"
    table = schema.read_table(pairs.path(name)).select(["pair_id", "prompt_id"])
    return dict(zip(table["pair_id"].to_pylist(), table["prompt_id"].to_pylist(), strict=True))


def _sweep(attempt: Attempt, pair_ids: list[str], tokens: np.ndarray) -> Sweep | None:
    """The sweep for DICE's penalty: lengths of the pairs that this round's selection would keep."""
    if attempt.fields["length_penalty"] != "dice":
        return None
    tokens = tokens.astype(np.int64)
    return sweep_of_pairs(tokens, pair_ids, attempt.fields["beta"], attempt.fields["rules"], seed=0)


def _noise(record: StepRecord) -> float:
    """Noise floor of the margins of a review or pairing step, in nats; 0 if not measured."""
    return max([0.0, *(value for name, value in record.metrics.items() if name.startswith(NOISE))])


def _probes(attempt: Attempt, pairs: pa.Table) -> dict[str, pa.Table]:
    expected = _keys(pairs)
    return {name: _joined(attempt, name, expected) for name in _names(attempt, "exact-")}


def _names(attempt: Attempt, beginning: str) -> list[str]:
    """Inputs that begin so, newest first; those of several folds count once."""
    return sorted({name.split(FOLD)[0] for name in attempt.spec.inputs if name.startswith(beginning)})


def _keys(pairs: pa.Table) -> list[str]:
    """Keys of the pairs' responses, in order."""
    return [f"{pair}/{side}" for pair in pairs["pair_id"].to_pylist() for side in ("chosen", "rejected")]


def _joined(attempt: Attempt, name: str, keys: Sequence[str]) -> pa.Table:
    """Log-probabilities from one step, or from one for each fold, put together in the order of `keys`."""
    names = sorted(n for n in attempt.spec.inputs if n == name or n.startswith(f"{name}{FOLD}"))
    found = [schema.read_table(attempt.input(n).path("logps.parquet"), schema.LOGPS) for n in names]
    if len(found) == 1:
        return found[0]
    places = {key: place for place, key in enumerate(keys)}
    table = pa.concat_tables(found)
    order = np.argsort([places.get(id, len(keys)) for id in table["id"].to_pylist()], kind="stable")
    return table.take(order.astype(np.int64))


def _memory(
    attempt: Attempt, pairs: pa.Table, policy: pa.Table, reference: pa.Table | None
) -> dict[str, float | int | None]:
    """Mean margins, in nats, of the human pairs that the head was trained on: under the head, which may
    remember them, and under its fold policies, which cannot.

    Args:
        pairs: the human pairs.
        policy, reference: the scores that the review uses in the head's place.
    """
    mixture = attempt.input("head_mixture").path("mixture.parquet")
    rows = schema.iter_rows(mixture, ["pair_id", "origin"])
    trained = {row["pair_id"] for row in rows if row["origin"] == "human"}
    seen = np.array([pair in trained for pair in pairs["pair_id"].to_pylist()], dtype=bool)
    own = _logps(attempt, "head_policy", pairs)
    refers = _logps(attempt, "head_reference", pairs) if reference is not None else None
    return {
        "review/pairs": int(seen.sum()),
        "review/head_mean": _mean_margin(attempt, own, refers, seen),
        "review/crossfit_mean": _mean_margin(attempt, policy, reference, seen),
    }


def _mean_margin(
    attempt: Attempt, policy: pa.Table, reference: pa.Table | None, rows: np.ndarray
) -> float | None:
    """Mean margin of some pairs in nats, without a length penalty; None without a finite one."""
    beta = attempt.fields["beta"]
    refers = None if reference is None else reference["logps"].to_numpy()
    tokens = policy["tokens"].to_numpy()
    rewards = score_responses(attempt.fields["score"], policy["logps"].to_numpy(), refers, tokens, beta)
    margins = ((rewards[0::2] - rewards[1::2]) / beta)[rows]
    margins = margins[np.isfinite(margins)]
    return round(float(margins.mean()), 6) if margins.size else None


def _logps(attempt: Attempt, name: str, pairs: pa.Table) -> pa.Table:
    """Log-probabilities under one policy, after a check that they belong to these pairs in this order."""
    expected = _keys(pairs)
    table = _joined(attempt, name, expected)
    if table["id"].to_pylist() != expected:
        raise SeraError(
            f"{name}: its log-probabilities belong to other pairs; delete that step and run again"
        )
    return table
