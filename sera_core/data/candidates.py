"""Candidates: responses to prompts with ratings by people or another system, read from a file.

A row has `response`, `rating` (a number, larger is better; empty: not rated), either `prompt` (text or
messages) or the `prompt_id` that `sera sample` writes, and optionally `rater`: who rated it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sera_core.data.parsing import parse_prompt
from sera_core.data.sources import Row, read_rows
from sera_core.errors import InputError


@dataclass(frozen=True)
class Candidate:
    """One rating of one response."""

    prompt_id: str
    response: str
    rating: float
    rater: str | None


def read_candidates(path: str) -> list[Candidate]:
    """The rated rows of a file, in file order.

    Raises:
        InputError: a malformed row (named), or no rating at all.
    """
    found = list(_candidates(read_rows(path)))
    if not found:
        raise InputError(f"{path}: no row has a rating; give each response a number in the column `rating`")
    return found


def _candidates(rows: list[Row]) -> Iterator[Candidate]:
    for row in rows:
        rating = _rating(row)
        response, rater = _text(row, "response"), row.data.get("rater")
        if rater is not None and not isinstance(rater, str):
            raise InputError(
                f"{row.where}: rater is no text; write who rated the response, or leave it empty"
            )
        if rating is not None:
            yield Candidate(_prompt_id(row), response, rating, rater)


def _rating(row: Row) -> float | None:
    value = row.data.get("rating")
    if value is None or value == "":
        return None
    if "rating" not in row.data or isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"{row.where}: rating is {value!r:.40}; give a number, larger is better")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{row.where}: rating is {value!r:.40}; give a number, larger is better")
    return number


def _text(row: Row, name: str) -> str:
    value = row.data.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.where}: {name} has no text; every row is a response that was rated")
    return value


def _prompt_id(row: Row) -> str:
    known = row.data.get("prompt_id")
    if known is None:
        return parse_prompt(row).prompt_id
    if not isinstance(known, str):
        raise InputError(f"{row.where}: prompt_id is no text; give the one of `sera sample`, or a prompt")
    return known
