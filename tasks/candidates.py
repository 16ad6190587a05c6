"""Take candidates from a file (`pairing.by = "file:…"`): responses that people or a system have rated."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.data.candidates import Candidate, read_candidates
from sera_core.data.rendering import Renderer
from sera_core.data.sources import source_digest
from sera_core.errors import InputError

FILES = ["responses.parquet", "ratings.parquet", "dropped.parquet"]
Row = dict[str, Any]


def load_candidates(attempt: Attempt) -> list[str]:
    """Write the candidates as responses without log-probabilities, their ratings, and prompts without any.

    A response with several ratings has their mean.

    Raises:
        InputError: another file than at the run's start, or no candidate answers a train prompt.
    """
    where: str = attempt.spec.where["file"]
    if source_digest(where) != attempt.fields["rater"]["sha256"]:
        raise InputError(
            f"pairing.by: {where} changed during the run; restore it, or start a run under a new name"
        )
    by_prompt: dict[str, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    for candidate in read_candidates(where):
        by_prompt[candidate.prompt_id][candidate.response].append(candidate)
    renderer = Renderer(attempt.input("model").folder("policy"))
    responses: list[Row] = []
    ratings: list[Row] = []
    without: list[tuple[str, str]] = []
    for prompt in _prompts(attempt):
        answers = by_prompt.pop(prompt["prompt_id"], {})
        fitting = [*_fitting(attempt, renderer, prompt, answers)]
        responses += [row for row, _ in fitting]
        ratings += [row for _, row in fitting]
        if not fitting:
            without.append((prompt["prompt_id"], "too_long" if answers else "no_candidate"))
    attempt.counts["other_prompts"] = len(by_prompt)
    if not responses:
        raise InputError(
            f"{where}: none of its {len(by_prompt):,} prompts is a train prompt with a response that fits; "
            "prompts must be the same text as in data.train"
        )
    _write(attempt, responses, ratings, without)
    return FILES


def _prompts(attempt: Attempt) -> Iterator[Row]:
    """The train side's distinct prompts, in prompt_id order."""
    rows = schema.iter_rows(attempt.input("rendered").path("prompts.parquet"), ["prompt_id", "prompt"])
    yield from (row for _, row in sorted({row["prompt_id"]: row for row in rows}.items()))


def _fitting(
    attempt: Attempt, renderer: Renderer, prompt: Row, answers: dict[str, list[Candidate]]
) -> Iterator[tuple[Row, Row]]:
    """(row of responses.parquet, row of ratings.parquet) of each response within the limit, in file order."""
    for number, (text, given) in enumerate(answers.items()):
        ids = renderer.response_ids(prompt["prompt"], text)
        if len(ids) > attempt.fields["max_response_tokens"]:
            attempt.counts["too_long"] += 1
            continue
        place = {"prompt_id": prompt["prompt_id"], "sample": number}
        response = {"response": text, "response_ids": ids, "seed": 0, "finish_reason": "stop"}
        lists: Row = {"tokens": len(ids), "past_logps": [], "past_ref_logps": []}
        mean = sum(one.rating for one in given) / len(given)
        yield place | response | lists, place | {"rating": mean, "rater": _raters(given)}


def _raters(given: Sequence[Candidate]) -> str | None:
    """Who rated a response, each once."""
    names = sorted({one.rater for one in given if one.rater is not None})
    return ", ".join(names) or None


def _write(
    attempt: Attempt, responses: Sequence[Row], ratings: Sequence[Row], without: Sequence[tuple[str, str]]
) -> None:
    schema.write_table(schema.from_rows(schema.RESPONSES, responses), attempt.write(FILES[0]))
    schema.write_table(schema.from_rows(schema.RATINGS, ratings), attempt.write(FILES[1]))
    ledger = [
        {"prompt_id": prompt, "origin": "generated", "stage": "sample", "kept": False, "reason": reason}
        for prompt, reason in without
    ]
    schema.write_table(schema.from_rows(schema.LEDGER, ledger), attempt.write(FILES[2]))
    attempt.counts["responses"] = len(responses)
    attempt.counts["prompts"] = len({row["prompt_id"] for row in responses})
    attempt.counts["prompts_without"] = len(without)
