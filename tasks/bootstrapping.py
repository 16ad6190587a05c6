"""Pairs out of the policy's own answers: its best with its worst, by its own reward."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed, pair_id
from sera_core.artifacts.step import Attempt
from sera_core.judging import (
    NOISE,
    Judgement,
    judge_responses,
    probed_noise,
    rounding,
    scored_table,
    sweep_of_responses,
)
from sera_core.noise import noise_floor
from sera_core.pairing import pair_responses

FILES = ["responses.parquet", "pairs.parquet", "pair_samples.parquet", "scored.parquet", "ledger.parquet"]
PAIR_SAMPLES = pa.schema(
    [("pair_id", pa.string()), ("chosen_sample", pa.int32()), ("rejected_sample", pa.int32())]
)
"""Which samples of its prompt a generated pair consists of."""


def pair_samples(attempt: Attempt) -> list[str]:
    """Write the judged responses, the generated pairs with margins, and a ledger of prompts without one."""
    samples = attempt.input("samples")
    responses = schema.read_table(samples.path("responses.parquet"), schema.RESPONSES)
    responses, judged = _judge(attempt, responses)
    schema.write_table(responses, attempt.write("responses.parquet"))
    prompts = sorted(set(responses["prompt_id"].to_pylist()))
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    index = np.array([numbers[p] for p in responses["prompt_id"].to_pylist()], dtype=np.int64)
    valid = _valid(attempt, responses, judged)
    pairing = pair_responses(
        np.where(valid, judged.ensemble, 0.0),
        index,
        responses["sample"].to_numpy(),
        _distinct(responses),
        valid,
        rule=attempt.fields["rule"],
        seeds=_seeds(attempt, prompts),
        prompts=np.arange(len(prompts)),
    )
    reasons = {prompts[int(p)]: str(r) for p, r in zip(pairing.prompts, pairing.prompt_reason, strict=True)}
    _write_pairs(attempt, responses, judged, pairing.chosen, pairing.rejected, reasons)
    _write_ledger(attempt, reasons)
    if judged.penalty is None:
        return FILES
    attempt.metrics["length_penalty/alpha"] = judged.penalty["alpha"]
    attempt.write("length_penalty.json").write_text(json.dumps(judged.penalty, indent=1) + "\n")
    return [*FILES, "length_penalty.json"]


def _judge(attempt: Attempt, responses: pa.Table) -> tuple[pa.Table, Judgement]:
    """Fill in the reward columns. The newest policy's values come with the samples unless scored apart."""
    fields, inputs = attempt.fields, attempt.spec.inputs
    scored = [_values(attempt, name) for name in sorted(inputs) if name.startswith("policy-")]
    references = [_values(attempt, name) for name in sorted(inputs) if name.startswith("reference-")]
    policies = scored
    if len(scored) < len(fields["weights"]):
        policies = [responses["policy_logps"].to_numpy(), *scored]
    sweep, tokens = None, responses["tokens"].to_numpy().astype(np.int64)
    if fields["length_penalty"] == "dice":
        _, prompts = np.unique(responses["prompt_id"].to_numpy(zero_copy_only=False), return_inverse=True)
        sweep = sweep_of_responses(tokens, prompts, _usable(attempt, responses))
    judged = judge_responses(
        fields["score"],
        fields["beta"],
        fields["weights"],
        policies,
        references,
        tokens,
        sweep,
    )
    noise = probed_noise(
        fields["score"],
        fields["beta"],
        fields["weights"],
        [
            f"{p}/{s}"
            for p, s in zip(responses["prompt_id"].to_pylist(), responses["sample"].to_pylist(), strict=True)
        ],
        policies,
        references,
        {name: _logps(attempt, name) for name in inputs if name.startswith("exact-")},
    )
    attempt.metrics[f"{NOISE}_generated"] = round(noise_floor(noise, fields["responses"]), 6)
    filled: dict[str, Any] = {name: responses[name].to_pylist() for name in responses.column_names[:7]}
    filled |= {
        "policy_logps": policies[0],
        "past_logps": np.stack(policies[1:], axis=1).tolist()
        if len(policies) > 1
        else [[]] * responses.num_rows,
        "past_ref_logps": np.stack(references[1:], axis=1).tolist()
        if len(references) > 1
        else [[]] * responses.num_rows,
        "reward": judged.reward,
        "ensemble_reward": judged.ensemble,
    }
    if references:
        filled["ref_logps"] = references[0]
    return schema.table(schema.RESPONSES, filled), judged


def _values(attempt: Attempt, name: str) -> np.ndarray:
    return _logps(attempt, name)["logps"].to_numpy()


def _logps(attempt: Attempt, name: str) -> pa.Table:
    return schema.read_table(attempt.input(name).path("logps.parquet"), schema.LOGPS)


def _valid(attempt: Attempt, responses: pa.Table, judged: Judgement) -> np.ndarray:
    """A response may be paired when it has text, ended by itself (or may be cut), and has a finite reward."""
    finite = np.isfinite(judged.ensemble)
    empty, cut = _empty(responses), _cut(responses)
    attempt.metrics |= {
        "responses": responses.num_rows,
        "responses/empty": int(empty.sum()),
        "responses/cut_by_limit": int(cut.sum()),
        "responses/non_finite": int((~finite).sum()),
        "responses/mean_tokens": float(np.mean(responses["tokens"].to_numpy()))
        if responses.num_rows
        else None,
    }
    return finite & _usable(attempt, responses)


def _usable(attempt: Attempt, responses: pa.Table) -> np.ndarray:
    """Whether a response has text, and ended by itself where that is asked for."""
    may_be_cut = attempt.fields["allow_cut"]
    return ~_empty(responses) if may_be_cut else ~_empty(responses) & ~_cut(responses)


def _empty(responses: pa.Table) -> np.ndarray:
    return np.array([not text.strip() for text in responses["response"].to_pylist()], dtype=bool)


def _cut(responses: pa.Table) -> np.ndarray:
    return np.array([reason == "length" for reason in responses["finish_reason"].to_pylist()], dtype=bool)


def _distinct(responses: pa.Table) -> np.ndarray:
    """Equal numbers for equal token ids: two samples of one prompt may be the same response."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array(
        [numbers.setdefault(tuple(ids), len(numbers)) for ids in responses["response_ids"].to_pylist()],
        dtype=np.int64,
    )


def _seeds(attempt: Attempt, prompts: list[str]) -> dict[int, int] | None:
    if "seed" not in attempt.fields:
        return None
    seed, round = attempt.fields["seed"], attempt.fields["round"]
    return {number: derived_seed(seed, round, prompt, "rejected") for number, prompt in enumerate(prompts)}


def _write_pairs(
    attempt: Attempt,
    responses: pa.Table,
    judged: Judgement,
    chosen: np.ndarray,
    rejected: np.ndarray,
    reasons: dict[str, str],
) -> None:
    prompts = _prompts(attempt)
    rows, samples, picked = [], [], []
    seen: set[str] = set()
    for won, lost in sorted(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        pair, sample = _pair(responses, prompts, won, lost, attempt.fields["round"])
        if pair["chosen"] == pair["rejected"]:  # other token ids, the same text
            reasons[pair["prompt_id"]] = "equal_text"
        elif pair["pair_id"] not in seen:
            seen.add(pair["pair_id"])
            rows.append(pair)
            samples.append(sample)
            picked.append((won, lost))
    won, lost = (np.array([p[side] for p in picked], dtype=np.int64) for side in (0, 1))
    schema.write_table(schema.from_rows(schema.PAIRS, rows), attempt.write("pairs.parquet"))
    schema.write_table(schema.from_rows(PAIR_SAMPLES, samples), attempt.write("pair_samples.parquet"))
    policy, tokens = responses["policy_logps"].to_numpy(), responses["tokens"].to_numpy()
    reference = responses["ref_logps"]
    refs = reference.to_numpy() if reference.null_count == 0 else None
    scored = scored_table(
        [row["pair_id"] for row in rows],
        (policy[won], policy[lost]),
        None if refs is None else (refs[won], refs[lost]),
        (tokens[won], tokens[lost]),
        (judged.reward[won], judged.reward[lost]),
        (judged.ensemble[won], judged.ensemble[lost]),
        attempt.fields["beta"],
        rounding(attempt.fields["score"]),
    )
    schema.write_table(scored, attempt.write("scored.parquet"))
    attempt.counts["pairs"] = len(rows)


def _pair(
    responses: pa.Table, prompts: dict[str, dict[str, Any]], won: int, lost: int, round: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    best, worst = responses.slice(won, 1).to_pylist()[0], responses.slice(lost, 1).to_pylist()[0]
    prompt = prompts[best["prompt_id"]]
    texts = {"chosen": best, "rejected": worst}
    answers = {side: [{"role": "assistant", "content": r["response"]}] for side, r in texts.items()}
    id = pair_id(prompt["prompt"], answers["chosen"], answers["rejected"])
    row = {
        "pair_id": id,
        "prompt_id": best["prompt_id"],
        "format": "conversational",
        "prompt": prompt["prompt"],
        **answers,
        "prompt_ids": prompt["prompt_ids"],
        **{f"{side}_ids": r["response_ids"] for side, r in texts.items()},
        "origin": "generated",
        "round": round,
    }
    return row, {"pair_id": id, "chosen_sample": best["sample"], "rejected_sample": worst["sample"]}


def _prompts(attempt: Attempt) -> dict[str, dict[str, Any]]:
    path = attempt.input("rendered").path("prompts.parquet")
    return {row["prompt_id"]: row for row in schema.iter_rows(path)}


def _write_ledger(attempt: Attempt, reasons: dict[str, str]) -> None:
    """Prompts that gave no pair, and why (the pairs themselves are in the selection's ledger)."""
    counts = Counter(reasons.values())
    attempt.counts["prompts"] = len(reasons)
    attempt.counts.update({f"prompts/{reason}": count for reason, count in counts.items()})
    rows = [
        {
            "prompt_id": prompt,
            "origin": "generated",
            "round": attempt.fields["round"],
            "stage": "pair",
            "kept": False,
            "reason": reason,
        }
        for prompt, reason in sorted(reasons.items())
        if reason != "paired"
    ]
    schema.write_table(schema.from_rows(schema.LEDGER, rows), attempt.write("ledger.parquet"))
