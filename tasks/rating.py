"""Rate the policy's responses by a rater: a reward model, a chat model, or a function of the user's own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import Lookup, Rows, row_groups, strings
from sera_core.judges.named import Asking, NamedRater, Opening, find_rater
from sera_core.judges.rating import Question, Rater, Rating
from tasks.asking import Answers, Inquiry, Key, Row, ask, refuse_another
from tasks.engines.local_chat import open_generate

RATINGS = "ratings.parquet"


def rate_samples(attempt: Attempt) -> list[str]:
    """Write ratings.parquet: a row for each response, in their order.

    Responses that cannot be paired are not rated: those without text, and those cut by the length limit
    unless `allow_cut`.

    Raises:
        SeraError: the rater is another one now, or failed too often (`tasks.asking.ask`).
    """
    keys, usable = _responses(attempt)
    wanted: dict[Key, int] = {key: row for row, key in enumerate(keys) if usable[row]}
    named = _named(attempt)
    inquiry: Inquiry[int] = Inquiry(
        f"the rater {named.name}",
        schema.RATINGS,
        lambda row: (row["prompt_id"], row["sample"]),
        lambda key: key,
        "responses",
        "rating",
        len(wanted),
    )

    def open() -> tuple[Answers[int], int]:
        rater = named.open(Opening(open_generate, attempt.execution.device))
        texts = _Texts(attempt)
        return lambda rows: _rated(rater, texts, rows), rater.batch

    found = ask(attempt, inquiry, wanted, open)
    blank: Mapping[str, Any] = {}
    rows = [{"prompt_id": key[0], "sample": key[1]} | dict(found.get(key, blank)) for key in keys]
    schema.write_table(schema.from_rows(schema.RATINGS, rows), attempt.write(RATINGS))
    _record(attempt, len(keys), list(found.values()))
    return [RATINGS]


def _named(attempt: Attempt) -> NamedRater:
    """The rater, the same one as in the run's configuration.

    Raises:
        SeraError: its files, source or address have changed since the run was started.
    """
    named = find_rater(attempt.spec.where["rater"], Asking())
    refuse_another("rater", named.name, named.identity, attempt.fields["rater"])
    return named


def _responses(attempt: Attempt) -> tuple[list[tuple[str, int]], np.ndarray]:
    """(prompt_id, sample) of each response, and whether it can be paired."""
    keys: list[tuple[str, int]] = []
    usable: list[bool] = []
    names = ["prompt_id", "sample", "response", "finish_reason"]
    path = attempt.input("samples").path("responses.parquet")
    for table in row_groups(path, schema.RESPONSES, names):
        for row in table.to_pylist():
            keys.append((row["prompt_id"], row["sample"]))
            cut = row["finish_reason"] == "length" and not attempt.fields["allow_cut"]
            usable.append(bool(row["response"].strip()) and not cut)
    return keys, np.array(usable, dtype=bool)


class _Texts:
    """Prompts and responses by row of responses.parquet, read as they are needed."""

    def __init__(self, attempt: Attempt) -> None:
        path = attempt.input("rendered").path("prompts.parquet")
        self._lookup = Lookup(strings(path, schema.PROMPTS, "prompt_id"))
        self._prompts = Rows(path, ["prompt"])
        names = ["prompt_id", "sample", "response"]
        self._responses = Rows(attempt.input("samples").path("responses.parquet"), names)

    def of(self, rows: Sequence[int]) -> list[tuple[dict[str, Any], Question]]:
        """Each response with the question about it."""
        responses = self._responses.take(rows)
        places = self._lookup.places(np.array([row["prompt_id"] for row in responses], dtype=np.str_))
        prompts = self._prompts.take(places)
        return [
            (response, Question(prompt["prompt"], response["response"]))
            for response, prompt in zip(responses, prompts, strict=True)
        ]


def _rated(rater: Rater, texts: _Texts, rows: Sequence[int]) -> list[Row]:
    """Rows of ratings.parquet; answers with the same text to one prompt are rated once."""
    asked = texts.of(rows)
    distinct = {question.key: question for _, question in asked}
    ratings = dict(zip(distinct, rater.rate(list(distinct.values())), strict=True))
    paid = set[str]()
    found = []
    for response, question in asked:
        rating, first = ratings[question.key], question.key not in paid
        paid.add(question.key)
        found.append(_row(response, rating, first))
    return found


def _row(response: Mapping[str, Any], rating: Rating, first: bool) -> Row:
    return {
        "prompt_id": response["prompt_id"],
        "sample": response["sample"],
        "rating": rating.value,
        "failure": rating.failure,
        "prompt_tokens": rating.prompt_tokens if first else None,
        "answer_tokens": rating.answer_tokens if first else None,
    }


def _record(attempt: Attempt, responses: int, rows: Sequence[Row]) -> None:
    """Counts and metrics; a rater's tokens are not the run's, so no limit counts them."""
    failed = Counter(row["failure"] for row in rows if row["failure"] is not None)
    attempt.counts["responses"] = responses
    attempt.counts["rated"] = len(rows) - failed.total()
    attempt.counts["not_asked"] = responses - len(rows)
    attempt.counts.update({f"failed/{reason}": count for reason, count in failed.items()})
    for name in ("prompt_tokens", "answer_tokens"):
        known = [row[name] for row in rows if row[name] is not None]
        if known:
            attempt.metrics[f"rater/{name}"] = sum(known)
