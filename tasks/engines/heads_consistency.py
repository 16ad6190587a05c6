"""How far the two newest heads agree on the responses that a round's generated pairs were made of."""

from pathlib import Path

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import numbers, row_groups, strings
from sera_core.method.consistency import ranking_consistency
from sera_core.method.rewards import score_responses


def heads_consistency(attempt: Attempt) -> float | None:
    """CREAM's C (`ranking_consistency`) of the step's responses, from the stored log-probabilities.

    Rewards are those of each head alone, without the length penalty. None if the step has no responses, or
    they were scored by one head only (round 1). A response sampled again counts once: noise alone would rank
    it against itself.
    """
    if "responses" not in attempt.spec.inputs:
        return None
    path = attempt.input("responses").path("responses.parquet")
    older = _first(path, "past_logps")
    if older is None:
        return None
    score, beta = attempt.fields["score"], attempt.fields["train"]["beta"]
    tokens = numbers(path, schema.RESPONSES, "tokens").astype(np.int64)
    newer, references = numbers(path, schema.RESPONSES, "policy_logps"), (None, None)
    if score != "simpo":
        references = numbers(path, schema.RESPONSES, "ref_logps"), _first(path, "past_ref_logps")
    _, prompts = np.unique(strings(path, schema.RESPONSES, "prompt_id"), return_inverse=True)
    newer = np.where(_repeated(path), np.nan, newer)
    return ranking_consistency(
        score_responses(score, newer, references[0], tokens, beta),
        score_responses(score, older, references[1], tokens, beta),
        prompts,
    )


def _repeated(path: Path) -> np.ndarray:
    """Whether the same prompt has the same token ids in an earlier row, [response]."""
    seen, repeated = set[tuple[str, tuple[int, ...]]](), []
    for table in row_groups(path, schema.RESPONSES, ["prompt_id", "response_ids"]):
        for prompt, ids in zip(
            table["prompt_id"].to_pylist(), table["response_ids"].to_pylist(), strict=True
        ):
            repeated.append((prompt, tuple(ids)) in seen)
            seen.add((prompt, tuple(ids)))
    return np.array(repeated, dtype=bool)


def _first(path: Path, name: str) -> np.ndarray | None:
    """Each response's value of the newest past head, the first of its list; None if the lists are empty."""
    pieces = [
        table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
        for table in row_groups(path, schema.RESPONSES, [name])
    ]
    return None if not pieces or not pieces[0].size else np.concatenate(pieces)[:, 0]
