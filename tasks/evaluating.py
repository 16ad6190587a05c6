"""Evidence about a policy: held-out margins, lengths, KL and diversity, each with its interval."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.data.differences import read_differences
from sera_core.method import diagnostics
from sera_core.method.panel import TOKENS
from sera_core.method.reliance import reliance
from sera_core.method.win_rates import Rate, bootstrap_interval, win_rate
from sera_core.reviewers import interleaved, judge_responses, prompt_groups, rounding, scored_table

Metrics = dict[str, Any]
RELIANCE = (
    *("reliance", "balanced", "worst_side", "aligned", "counter", "equal"),
    *("preferred_more", "correlation", "after_length"),
)
"""What is recorded of each feature (see `method.reliance`); `accuracy` is the same for all features."""


def evaluate_policy(attempt: Attempt) -> list[str]:
    """Write evidence.json and heldout.parquet (held-out margins under this policy and the head before)."""
    heldout = _scored(attempt, "heldout")
    train = _scored(attempt, "train")
    schema.write_table(heldout, attempt.write("heldout.parquet"))
    metrics = {
        **_margins(attempt, heldout, "heldout"),
        **_trained_margins(attempt, train),
        **_change(attempt, heldout),
    }
    if "samples" in attempt.spec.inputs:
        metrics |= _samples(attempt)
    return _finish(attempt, metrics, heldout.num_rows, ["evidence.json", "heldout.parquet"])


def test_policy(attempt: Attempt) -> list[str]:
    """Write evidence.json and test.parquet: the test side, which decides nothing."""
    scored = _scored(attempt, "test")
    schema.write_table(scored, attempt.write("test.parquet"))
    return _finish(
        attempt, _margins(attempt, scored, "test"), scored.num_rows, ["evidence.json", "test.parquet"]
    )


def _finish(attempt: Attempt, metrics: Metrics, pairs: int, files: list[str]) -> list[str]:
    attempt.counts["pairs"] = pairs
    attempt.metrics |= metrics
    text = json.dumps(_plain(metrics), indent=1, sort_keys=True)
    attempt.write("evidence.json").write_text(text + "\n")
    return files


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: NaN (not measured) is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def rate(value: Rate) -> Metrics:
    """A rate as it stands in records: value, interval, number of observations."""
    return _plain({name: round(v, 6) if isinstance(v, float) else v for name, v in asdict(value).items()})


def _logps(attempt: Attempt, name: str) -> np.ndarray:
    return schema.read_table(attempt.input(name).path("logps.parquet"), schema.LOGPS)["logps"].to_numpy()


def _scored(attempt: Attempt, side: str, policy: str = "policy") -> pa.Table:
    """Margins of one side's pairs under a policy, by the run's own score and the initial reference."""
    fields = attempt.fields
    table = schema.read_table(attempt.input(f"{policy}_{side}").path("logps.parquet"), schema.LOGPS)
    reference = _logps(attempt, f"reference_{side}")
    tokens = table["tokens"].to_numpy().astype(np.int64)
    judged = judge_responses(
        fields["score"],
        fields["beta"],
        [1.0],
        [table["logps"].to_numpy()],
        [] if fields["score"] == "simpo" else [reference],
        tokens,
    )
    ids = [id.removesuffix("/chosen") for id in table["id"].to_pylist()[0::2]]
    reward = (judged.reward[0::2], judged.reward[1::2])
    refs = (reference[0::2], reference[1::2])
    return scored_table(
        ids,
        interleaved(table),
        refs,
        (tokens[0::2], tokens[1::2]),
        reward,
        reward,
        fields["beta"],
        rounding(fields["score"]),
    )


def _margins(attempt: Attempt, scored: pa.Table, side: str) -> Metrics:
    margins = scored["margin"].to_numpy()
    finite = np.isfinite(margins)
    margins, groups = margins[finite], _groups(attempt, scored, side)[finite]
    chosen, rejected = (
        scored[f"{s}_tokens"].to_numpy()[finite].astype(np.int64) for s in ("chosen", "rejected")
    )
    correct = diagnostics.correctness(margins)
    return {
        f"{side}/rewards/accuracies": rate(_interval(attempt, correct, groups)),
        f"{side}/margin": rate(_interval(attempt, margins, groups)),
        f"{side}/rewards/margins": float(margins.mean() * attempt.fields["beta"]) if margins.size else None,
        f"{side}/margin_quantiles": [round(float(q), 6) for q in diagnostics.quantiles(margins)]
        if margins.size
        else [],
        f"{side}/chosen_longer": rate(diagnostics.longer_share(chosen, rejected, groups=groups)),
        f"{side}/preferred_longer": rate(_preferred_longer(chosen, rejected, margins, groups)),
        f"{side}/length_margin_correlation": _number(
            diagnostics.length_margin_correlation(chosen, rejected, margins) if margins.size else None
        ),
        f"{side}/non_finite": int((~finite).sum()),
        f"{side}/accuracy_by_length": _by_length(attempt, chosen - rejected, correct, groups),
        **_reliance(attempt, scored.filter(pa.array(finite))["pair_id"].to_pylist(), margins, groups, side),
    }


def _reliance(
    attempt: Attempt, ids: Sequence[str], margins: np.ndarray, groups: np.ndarray, side: str
) -> Metrics:
    """How the ranking depends on each feature: rates named `<side>/reliance/<feature>/<quantity>`.

    Quantities are those of RELIANCE; `n` counts the pairs that a quantity is of, `groups` their prompts.
    """
    differences = read_differences(attempt.input("features").path(f"{side}.parquet"), ids)
    found: Metrics = {}
    for name in attempt.fields["panel"]:
        measured = reliance(
            differences[name],
            margins,
            groups,
            length_difference=differences[TOKENS],
            seed=attempt.fields["seed"],
            resamples=attempt.fields["resamples"],
        )
        values = measured.accuracies | {
            "preferred_more": measured.preferred_more,
            "correlation": measured.correlation,
            "after_length": measured.after_length,
        }
        found |= {f"{side}/reliance/{name}/{key}": rate(values[key].rate) for key in RELIANCE}
    return found


def _groups(attempt: Attempt, scored: pa.Table, side: str) -> np.ndarray:
    """Number of each pair's prompt: intervals resample prompts, whose pairs move together."""
    path = attempt.input("rendered").path(f"{side}.parquet")
    return prompt_groups(path, scored["pair_id"].to_pylist())


def _preferred_longer(
    chosen: np.ndarray, rejected: np.ndarray, margins: np.ndarray, groups: np.ndarray
) -> Rate:
    """Share of pairs in which the policy's preferred answer is the longer one: is length what it learnt?"""
    turned = margins < 0
    preferred, other = np.where(turned, rejected, chosen), np.where(turned, chosen, rejected)
    return diagnostics.longer_share(preferred, other, groups=groups)


def _by_length(attempt: Attempt, difference: np.ndarray, correct: np.ndarray, groups: np.ndarray) -> Metrics:
    sides = {"chosen_longer": difference > 0, "chosen_shorter": difference < 0}
    return {name: rate(_interval(attempt, correct[mask], groups[mask])) for name, mask in sides.items()}


def _trained_margins(attempt: Attempt, train: pa.Table) -> Metrics:
    """Margins of the human pairs just trained on, beside the held-out ones: they are partly memorised.

    A relabelled pair was trained on turned, so its margin counts the other way round.
    """
    ledger = attempt.input("mixture").path("ledger.parquet")
    columns = ["pair_id", "origin", "kept", "reason"]
    trained = {
        row["pair_id"]: -1.0 if row["reason"] == "relabelled" else 1.0
        for row in schema.iter_rows(ledger, columns)
        if row["kept"] and row["origin"] == "human"
    }
    direction = np.array([trained.get(id, np.nan) for id in train["pair_id"].to_pylist()], dtype=np.float64)
    margins = direction * train["margin"].to_numpy()
    finite = np.isfinite(margins)
    margins, groups = margins[finite], _groups(attempt, train, "train")[finite]
    correct = diagnostics.correctness(margins)
    return {
        "trained/margin": rate(_interval(attempt, margins, groups)),
        "trained/rewards/accuracies": rate(_interval(attempt, correct, groups)),
    }


def _change(attempt: Attempt, heldout: pa.Table) -> Metrics:
    """Change since the policy before (the head, or the start), on the same held-out pairs."""
    before = _scored(attempt, "heldout", "previous")
    now, then = heldout["margin"].to_numpy(), before["margin"].to_numpy()
    both = np.isfinite(now) & np.isfinite(then)
    change = diagnostics.correctness(now[both]) - diagnostics.correctness(then[both])
    groups = _groups(attempt, heldout, "heldout")[both]
    return {
        "heldout/accuracy_change": rate(_interval(attempt, change, groups)),
        "heldout/margin_change": rate(_interval(attempt, now[both] - then[both], groups)),
        "heldout/sign_changes": _number(diagnostics.sign_changes(then[both], now[both])),
        "heldout/previous_accuracy": _number(diagnostics.reward_accuracy(then[both])),
    }


def _samples(attempt: Attempt) -> Metrics:
    """Lengths, KL and diversity of answers to held-out prompts, sampled at temperature 1."""
    table = schema.read_table(attempt.input("samples").path("responses.parquet"), schema.RESPONSES)
    policy = (
        _logps(attempt, "policy_samples")
        if "policy_samples" in attempt.spec.inputs
        else table["policy_logps"].to_numpy()
    )
    tokens = table["tokens"].to_numpy().astype(np.float64)
    ids = table["response_ids"].to_pylist()
    groups: dict[str, list[list[int]]] = {}
    for prompt, response in zip(table["prompt_id"].to_pylist(), ids, strict=True):
        groups.setdefault(prompt, []).append(response)
    cut = np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], dtype=np.float64)
    _, prompts = np.unique(np.array(table["prompt_id"].to_pylist(), dtype=str), return_inverse=True)
    return {
        "samples/tokens": rate(_interval(attempt, tokens, prompts)),
        "samples/cut_by_limit": rate(win_rate(cut, groups=prompts)),
        "samples/kl_reference": _kl(attempt, policy, _logps(attempt, "reference_samples"), prompts),
        "samples/kl_previous": _kl(attempt, policy, _logps(attempt, "previous_samples"), prompts),
        "samples/distinct_2": _number(diagnostics.distinct_n(ids, 2)),
        "samples/self_overlap": _number(diagnostics.self_overlap(list(groups.values()))),
    }


def _kl(attempt: Attempt, policy: np.ndarray, reference: np.ndarray, prompts: np.ndarray) -> Metrics:
    """KL in nats a response: the plain estimate with its interval, and the non-negative one."""
    finite = np.isfinite(policy) & np.isfinite(reference)
    estimate = diagnostics.kl_estimate(policy[finite], reference[finite])
    return rate(_interval(attempt, policy[finite] - reference[finite], prompts[finite])) | {
        "non_negative": _number(estimate.non_negative)
    }


def _interval(attempt: Attempt, values: np.ndarray, groups: np.ndarray) -> Rate:
    return bootstrap_interval(
        np.asarray(values, dtype=np.float64),
        seed=attempt.fields["seed"],
        resamples=attempt.fields["resamples"],
        groups=groups,
    )


def _number(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), 6)
