"""Make pairs from the policy's responses: by default the best with the worst by implicit reward.

A rater may order them instead; the margins of the pairs are implicit ones all the same.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed, pair_id
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import Lookup, Rows, Writer, numbers, row_groups, strings
from sera_core.errors import SeraError
from sera_core.method.noise import noise_floor
from sera_core.method.pairing import (
    ANCHORED,
    Pairing,
    pair_responses,
    pair_with_anchors,
    sampled_policies,
)
from sera_core.reviewers import (
    NOISE,
    Judgement,
    judge_responses,
    probed_noise,
    rounding,
    scored_table,
    sweep_of_responses,
)

FILES = ["responses.parquet", "pairs.parquet", "pair_samples.parquet", "scored.parquet", "ledger.parquet"]
PAIRS_AT_ONCE = 256
"""Pairs whose texts are in memory at once."""


class _Samples:
    """The responses by number, without their texts and token ids, which stay in the file."""

    def __init__(self, attempt: Attempt) -> None:
        self.path = attempt.input("samples").path("responses.parquet")
        ids = strings(self.path, schema.RESPONSES, "prompt_id")
        self.prompts, self.index = np.unique(ids, return_inverse=True)
        """Distinct prompt_ids, ascending, and the prompt number of each response."""
        self.sample = self._numbers("sample")
        self.tokens = self._numbers("tokens")
        self.logps = self._numbers("policy_logps")
        self.empty, self.cut, self.distinct = self._read()
        self.usable = ~self.empty if attempt.fields["allow_cut"] else ~self.empty & ~self.cut
        """Whether a response has text and, if required, was not cut at the limit."""
        if np.count_nonzero(np.diff(self.index)) + 1 > max(1, self.prompts.size):
            raise SeraError(f"{self.path}: the responses of a prompt are not consecutive; sample again")

    def __len__(self) -> int:
        return self.index.size

    def rows_of(self, keys: pa.ChunkedArray) -> np.ndarray:
        """The row of each response, by its key `<prompt_id>/<sample>`; -1 for one that is not there."""
        return np.array([self._row_of(*key.rsplit("/", 1)) for key in keys.to_pylist()], dtype=np.int64)

    def _row_of(self, prompt: str, sample: str) -> int:
        number = int(np.searchsorted(self.prompts, prompt))
        if number == self.prompts.size or self.prompts[number] != prompt:
            return -1
        rows = np.flatnonzero((self.index == number) & (self.sample == int(sample)))
        return int(rows[0]) if rows.size else -1

    def _numbers(self, name: str) -> np.ndarray:
        return numbers(self.path, schema.RESPONSES, name)

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each response: whether it is empty, whether it was cut, and a hash of its token ids."""
        empty, cut, distinct = (np.zeros(len(self), dtype=kind) for kind in (bool, bool, np.int64))
        first, names = 0, ["response", "finish_reason", "response_ids"]
        for table in row_groups(self.path, schema.RESPONSES, names):
            rows = slice(first, first := first + table.num_rows)
            empty[rows] = [not text.strip() for text in table["response"].to_pylist()]
            cut[rows] = [reason == "length" for reason in table["finish_reason"].to_pylist()]
            distinct[rows] = [_hash(ids) for ids in table["response_ids"].to_pylist()]
        return empty, cut, distinct


def _hash(ids: list[int]) -> int:
    digest = hashlib.blake2b(np.array(ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def pair_samples(attempt: Attempt) -> list[str]:
    """Write the responses with rewards, the generated pairs with margins, and a ledger of other prompts."""
    samples = _Samples(attempt)
    policies, references = _inputs(attempt, samples)
    judged = _judge(attempt, samples, policies, references)
    _write_responses(attempt, samples, policies, references, judged)
    order = judged.ensemble if "ratings" not in attempt.spec.inputs else _ratings(attempt, samples)
    valid = _valid(attempt, samples, judged, order)
    pairing = _paired(attempt, samples, np.where(valid, order, 0.0), valid)
    reasons = pairing.prompt_reason.copy()
    won, lost = _write_pairs(attempt, samples, pairing.chosen, pairing.rejected, reasons)
    _write_scored(attempt, samples, policies, references, judged, won, lost)
    _write_ledger(attempt, samples.prompts, reasons)
    if judged.penalty is None:
        return FILES
    attempt.metrics["length_penalty/alpha"] = judged.penalty["alpha"]
    attempt.write("length_penalty.json").write_text(json.dumps(judged.penalty, indent=1) + "\n")
    return [*FILES, "length_penalty.json"]


def _paired(attempt: Attempt, samples: _Samples, rewards: np.ndarray, valid: np.ndarray) -> Pairing:
    rule, prompts = attempt.fields["rule"], np.arange(samples.prompts.size)
    if rule == ANCHORED:
        anchor = samples.sample >= attempt.fields["responses"]
        return pair_with_anchors(rewards, samples.index, samples.sample, valid, anchor, prompts)
    return pair_responses(
        rewards,
        samples.index,
        samples.sample,
        samples.distinct,
        valid,
        rule=rule,
        seeds=_seeds(attempt, samples.prompts),
        prompts=prompts,
    )


def _inputs(attempt: Attempt, samples: _Samples) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """log π of every response under policies and references, newest first.

    The newest policy's values come from the sampler, unless the samples were scored separately.
    """
    inputs = sorted(attempt.spec.inputs)
    policies = [_values(attempt, name) for name in inputs if name.startswith("policy-")]
    references = [_values(attempt, name) for name in inputs if name.startswith("reference-")]
    if len(policies) < len(attempt.fields["weights"]):
        policies = [samples.logps, *policies]
    return policies, references


def _judge(
    attempt: Attempt, samples: _Samples, policies: list[np.ndarray], references: list[np.ndarray]
) -> Judgement:
    """Rewards of every response; sets the metric for the noise in a generated pair's margin."""
    fields = attempt.fields
    sweep, tokens = None, samples.tokens.astype(np.int64)
    if fields["length_penalty"] == "dice":
        sweep = sweep_of_responses(tokens, samples.index, samples.usable)
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
        samples.rows_of,
        policies,
        references,
        {
            name: schema.read_table(attempt.input(name).path("logps.parquet"), schema.LOGPS)
            for name in attempt.spec.inputs
            if name.startswith("exact-")
        },
    )
    chosen_from = fields["responses"] * sampled_policies(fields["rule"])
    attempt.metrics[f"{NOISE}_generated"] = round(noise_floor(noise, chosen_from), 6)
    return judged


def _values(attempt: Attempt, name: str) -> np.ndarray:
    return numbers(attempt.input(name).path("logps.parquet"), schema.LOGPS, "logps")


def _write_responses(
    attempt: Attempt,
    samples: _Samples,
    policies: list[np.ndarray],
    references: list[np.ndarray],
    judged: Judgement,
) -> None:
    """The samples with their log-probabilities and rewards."""
    first, given = 0, schema.RESPONSES.names[:7]
    with Writer(attempt.write("responses.parquet"), schema.RESPONSES) as out:
        for table in row_groups(samples.path, schema.RESPONSES, given):
            rows = slice(first, first := first + table.num_rows)
            filled: dict[str, Any] = {
                "policy_logps": policies[0][rows],
                "past_logps": _lists(policies[1:], rows, table.num_rows),
                "past_ref_logps": _lists(references[1:], rows, table.num_rows),
                "reward": judged.reward[rows],
                "ensemble_reward": judged.ensemble[rows],
            }
            if references:
                filled["ref_logps"] = references[0][rows]
            out.write(schema.table(schema.RESPONSES, {n: table[n].combine_chunks() for n in given} | filled))


def _lists(values: list[np.ndarray], rows: slice, count: int) -> list[list[float]]:
    return np.stack([value[rows] for value in values], axis=1).tolist() if values else [[]] * count


def _ratings(attempt: Attempt, samples: _Samples) -> np.ndarray:
    """The rater's rating of each response; nan without one.

    Raises:
        SeraError: the ratings are of other responses.
    """
    path = attempt.input("ratings").path("ratings.parquet")
    ids, sample = strings(path, schema.RATINGS, "prompt_id"), numbers(path, schema.RATINGS, "sample")
    if not np.array_equal(ids, samples.prompts[samples.index]) or not np.array_equal(sample, samples.sample):
        raise SeraError(f"{path}: has ratings of other responses; delete that step and run again")
    return numbers(path, schema.RATINGS, "rating").astype(np.float64)


def _valid(attempt: Attempt, samples: _Samples, judged: Judgement, order: np.ndarray) -> np.ndarray:
    """Whether a response may be paired: has text, is not cut (unless allowed), and has a finite reward (and a
    rating, where a rater orders)."""
    finite = np.isfinite(judged.ensemble)
    if order is not judged.ensemble:
        attempt.metrics["responses/not_rated"] = int((~np.isfinite(order)).sum())
    attempt.metrics |= {
        "responses": len(samples),
        "responses/empty": int(samples.empty.sum()),
        "responses/cut_by_limit": int(samples.cut.sum()),
        "responses/non_finite": int((~finite).sum()),
        "responses/mean_tokens": float(np.mean(samples.tokens)) if len(samples) else None,
    }
    return finite & samples.usable & np.isfinite(order)


def _seeds(attempt: Attempt, prompts: np.ndarray) -> dict[int, int] | None:
    if "seed" not in attempt.fields:
        return None
    seed, round = attempt.fields["seed"], attempt.fields["round"]
    return {
        number: derived_seed(seed, round, str(prompt), "rejected") for number, prompt in enumerate(prompts)
    }


def _write_pairs(
    attempt: Attempt, samples: _Samples, chosen: np.ndarray, rejected: np.ndarray, reasons: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Write the pairs; returns the numbers of their responses, (chosen, rejected). Updates `reasons`."""
    order = np.lexsort((rejected, chosen))
    chosen, rejected = chosen[order], rejected[order]
    kept = np.zeros(chosen.size, dtype=bool)
    sources = _Sources(attempt, samples)
    last, seen = -1, set[str]()
    with (
        Writer(attempt.write("pairs.parquet"), sources.schema) as pairs,
        Writer(attempt.write("pair_samples.parquet"), schema.PAIR_SAMPLES) as numbered,
    ):
        for start in range(0, chosen.size, PAIRS_AT_ONCE):
            rows = slice(start, start + PAIRS_AT_ONCE)
            found = list(sources.pairs(chosen[rows], rejected[rows]))
            for number, (pair, _) in enumerate(found, start):
                prompt = samples.index[chosen[number]]
                if prompt != last:
                    last, seen = prompt, set()
                if pair["chosen"] == pair["rejected"]:  # same text with different token ids
                    reasons[prompt] = "equal_text"
                elif pair["pair_id"] not in seen:
                    seen.add(pair["pair_id"])
                    kept[number] = True
            left = [both for both, keep in zip(found, kept[rows], strict=True) if keep]
            pairs.write(schema.from_rows(schema.PAIRS, [pair for pair, _ in left]))
            numbered.write(schema.from_rows(schema.PAIR_SAMPLES, [sample for _, sample in left]))
    attempt.counts["pairs"] = int(kept.sum())
    return chosen[kept], rejected[kept]


class _Sources:
    """Responses and prompts by number, and the pairs they make."""

    def __init__(self, attempt: Attempt, samples: _Samples) -> None:
        self._round = attempt.fields["round"]
        path = attempt.input("rendered").path("prompts.parquet")
        self.schema = schema.as_held(schema.PAIRS, pq.read_schema(path))
        self._lookup = Lookup(strings(path, schema.PROMPTS, "prompt_id"))
        self._prompts = Rows(path, ["prompt_id", "prompt", "prompt_ids"])
        self._responses = Rows(samples.path, ["prompt_id", "sample", "response", "response_ids"])
        self._samples = samples

    def pairs(
        self, chosen: np.ndarray, rejected: np.ndarray
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(row of pairs.parquet, row of pair_samples.parquet) of each pair."""
        places = self._lookup.places(self._samples.prompts[self._samples.index[chosen]])
        if (places < 0).any():
            raise SeraError(f"{self._samples.path}: has a response to a prompt that is not rendered")
        prompts = self._prompts.take(places)
        responses = self._responses.take(np.concatenate([chosen, rejected]))
        for prompt, best, worst in zip(
            prompts, responses[: chosen.size], responses[chosen.size :], strict=True
        ):
            yield _pair(prompt, best, worst, self._round)


def _pair(
    prompt: dict[str, Any], best: dict[str, Any], worst: dict[str, Any], round: int
) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _write_scored(
    attempt: Attempt,
    samples: _Samples,
    policies: list[np.ndarray],
    references: list[np.ndarray],
    judged: Judgement,
    won: np.ndarray,
    lost: np.ndarray,
) -> None:
    def both(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values[won], values[lost]

    scored = scored_table(
        strings(attempt.folder / "pairs.parquet", schema.PAIRS, "pair_id"),
        both(policies[0]),
        both(references[0]) if references else None,
        both(samples.tokens),
        both(judged.reward),
        both(judged.ensemble),
        attempt.fields["beta"],
        rounding(attempt.fields["score"]),
    )
    schema.write_table(scored, attempt.write("scored.parquet"))
    if "ratings" in attempt.spec.inputs and len(scored):
        agrees = float(np.mean(scored["ensemble_margin"].to_numpy() > 0))
        attempt.metrics["pairs/implicit_agrees"] = round(agrees, 6)


def _write_ledger(attempt: Attempt, prompts: np.ndarray, reasons: np.ndarray) -> None:
    """Write the prompts without a pair and the reason (pairs are in the selection's ledger)."""
    attempt.counts["prompts"] = prompts.size
    counts = Counter(map(str, reasons))
    attempt.counts.update({f"prompts/{reason}": count for reason, count in counts.items()})
    left = np.flatnonzero(reasons != "paired")
    columns = {
        "prompt_id": prompts[left],
        "origin": ["generated"] * left.size,
        "round": [attempt.fields["round"]] * left.size,
        "stage": ["pair"] * left.size,
        "kept": [False] * left.size,
        "reason": list(map(str, reasons[left])),
    }
    schema.write_table(schema.table(schema.LEDGER, columns), attempt.write("ledger.parquet"))
