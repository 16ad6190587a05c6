"""Score human pairs with the policy's log-probabilities, and select pairs by margin."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.manifest import StepRecord
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import (
    Lookup,
    column,
    columns,
    compute,
    keys,
    numbers,
    strings,
    texts,
    values,
)
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

_AT_ONCE = 2**16
"""Pairs whose keys are in memory at once."""
_SETTINGS = ("fraction", "k", "threshold", "min_margin", "direction")


def review_pairs(attempt: Attempt) -> list[str]:
    """Write scored.parquet: rewards, margins and ensemble margins of every pair, in input order."""
    fields = attempt.fields
    pairs = column(attempt.input("pairs").path(fields["file"]), schema.PAIRS, "pair_id")
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
        _sweep(attempt, pairs, tokens),
    )
    noise = probed_noise(
        fields["score"],
        fields["beta"],
        fields["weights"],
        lambda probed: _rows_of(probed, pairs),
        [table["logps"].to_numpy() for table in policies],
        [table["logps"].to_numpy() for table in references],
        {name: _joined(attempt, name, pairs) for name in _names(attempt, "exact-")},
    )
    attempt.metrics[NOISE] = round(noise_floor(noise, 2), 6)
    if "head_mixture" in attempt.spec.inputs:
        attempt.metrics |= _memory(attempt, pairs, policies[0], references[0] if references else None)
    scored = scored_table(
        pairs,
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
    ids, prompts, margins = _scored(attempt)
    settings: dict[str, Any] = {name: fields[name] for name in _SETTINGS if name in fields}
    if "seed" in fields:
        settings["seed"] = derived_seed(fields["seed"], fields["round"], fields["origin"], "random")
    noise = _noise(attempt.input("review").record)
    if settings.get("min_margin", -np.inf) > -np.inf:
        settings["min_margin"] = attempt.metrics["floor_nats"] = max(settings["min_margin"], noise)
    if fields["rule"] == BY_VARIANCE:
        settings["variance"] = _variances(attempt, prompts)
    selection = select(margins, keys(ids), rule=fields["rule"], **settings)
    ledger = selection_table(ids, prompts, margins, selection, fields["origin"], fields["round"])
    schema.write_table(ledger, attempt.write("ledger.parquet"))
    counted = compute.value_counts(ledger["reason"]).to_pylist()
    attempt.counts.update({found["values"]: found["counts"] for found in counted})
    return ["ledger.parquet"]


def _variances(attempt: Attempt, prompts: pa.ChunkedArray) -> np.ndarray:
    """The variance of preferences between all responses to each pair's prompt."""
    path = attempt.input("review").path("responses.parquet")
    kinds, index = np.unique(strings(path, schema.RESPONSES, "prompt_id"), return_inverse=True)
    found = prompt_variance(numbers(path, schema.RESPONSES, "ensemble_reward"), index)
    return found[np.searchsorted(kinds, texts(prompts))]


def _scored(attempt: Attempt) -> tuple[pa.ChunkedArray, pa.ChunkedArray, np.ndarray]:
    """Id, prompt and ensemble margin (nats) of each scored pair.

    Raises:
        SeraError: the scores are of other pairs.
    """
    pairs = attempt.input("pairs")
    name = "train.parquet" if "train.parquet" in pairs.record.files else "pairs.parquet"
    with ThreadPoolExecutor(1, thread_name_prefix="sera-scores") as beside:
        scores = beside.submit(_margins, attempt)
        path = pairs.path(name)
        own, prompts = columns(path, schema.PAIRS, ["pair_id", "prompt_id"])
        ids, margins = scores.result()
    if not own.equals(ids):
        raise SeraError(
            f"{path}: has other pairs than the scores; delete the step that scored them and run again"
        )
    return ids, prompts, margins


def _margins(attempt: Attempt) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Id and ensemble margin (nats) of each scored pair."""
    path = attempt.input("review").path("scored.parquet")
    ids, margins = columns(path, schema.SCORED, ["pair_id", "ensemble_margin"])
    return ids, values(margins)


def _sweep(attempt: Attempt, pair_ids: pa.ChunkedArray, tokens: np.ndarray) -> Sweep | None:
    """The sweep for DICE's penalty: lengths of the pairs that this round's selection would keep."""
    if attempt.fields["length_penalty"] != "dice":
        return None
    beta, rules = attempt.fields["beta"], attempt.fields["rules"]
    return sweep_of_pairs(tokens.astype(np.int64), keys(pair_ids), beta, rules, seed=0)


def _noise(record: StepRecord) -> float:
    """Noise floor of the margins of a review or pairing step, in nats; 0 if not measured."""
    return max([0.0, *(value for name, value in record.metrics.items() if name.startswith(NOISE))])


def _names(attempt: Attempt, beginning: str) -> list[str]:
    """Inputs that begin so, newest first; those of several folds count once."""
    return sorted({name.split(FOLD)[0] for name in attempt.spec.inputs if name.startswith(beginning)})


def _rows_of(keys_of: pa.ChunkedArray, pairs: pa.ChunkedArray) -> np.ndarray:
    """The row of each response (`<pair_id>/<side>`) where both of every pair come in turn; -1 without one."""
    pair_ids = compute.replace_substring_regex(keys_of, r"/(chosen|rejected)$", "")
    found = Lookup(keys(pairs)).places(keys(pair_ids))
    rows = 2 * found + compute.ends_with(keys_of, "/rejected").to_numpy()
    return np.where(found < 0, -1, rows)


def _joined(attempt: Attempt, name: str, pairs: pa.ChunkedArray) -> pa.Table:
    """Log-probabilities from one step, or from one for each fold, put together in the order of `pairs`."""
    names = sorted(n for n in attempt.spec.inputs if n == name or n.startswith(f"{name}{FOLD}"))
    found = [schema.read_table(attempt.input(n).path("logps.parquet"), schema.LOGPS) for n in names]
    if len(found) == 1:
        return found[0]
    table = pa.concat_tables(found)
    return table.take(np.argsort(_rows_of(table["id"], pairs), kind="stable"))


def _memory(
    attempt: Attempt, pairs: pa.ChunkedArray, policy: pa.Table, reference: pa.Table | None
) -> dict[str, float | int | None]:
    """Mean margins, in nats, of the human pairs that the head was trained on: under the head, which may
    remember them, and under its fold policies, which cannot.

    Args:
        pairs: ids of the human pairs.
        policy, reference: the scores that the review uses in the head's place.
    """
    mixture = attempt.input("head_mixture").path("mixture.parquet")
    human = compute.equal(column(mixture, schema.MIXTURE, "origin"), "human")
    trained = column(mixture, schema.MIXTURE, "pair_id").filter(human)
    seen = compute.is_in(pairs, value_set=trained.combine_chunks()).to_numpy()
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


def _logps(attempt: Attempt, name: str, pairs: pa.ChunkedArray) -> pa.Table:
    """Log-probabilities and tokens under one policy, after a check that they are of these pairs in order."""
    table = _joined(attempt, name, pairs)
    if table.num_rows != 2 * len(pairs) or not _are_of(table["id"], pairs):
        raise SeraError(
            f"{name}: its log-probabilities belong to other pairs; delete that step and run again"
        )
    return table.drop_columns(["id"])


def _are_of(responses: pa.ChunkedArray, pairs: pa.ChunkedArray) -> bool:
    """Whether these are the keys of the pairs' responses, the chosen and the rejected one of each in turn."""
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs.slice(start, _AT_ONCE)
        both = responses.slice(2 * start, 2 * len(some))
        for number, side in enumerate(("chosen", "rejected")):
            own = both.take(np.arange(number, len(both), 2))
            if not own.equals(compute.binary_join_element_wise(some, f"/{side}", "")):
                return False
    return True
