"""Ask a judge or a rater in batches, store what it answers at once, and stop when it does not answer.

An interrupted step continues without asking again for what is stored. Failures are not stored before the step
is done: the next attempt asks about them again.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.errors import SeraError
from sera_core.judges.comparison import FAILURES

MAX_FAILED = 0.5
"""Share of the questions that may stay without an answer."""
MAX_PASSING = 0.05
"""Share of the questions that may stay without an answer for a reason that passes."""
PASSING = frozenset({"connection", "timeout", "rate_limited", "server_error"})
"""Failures that the same question may not have an hour later."""
SILENT = 16
"""Failures in one batch, without any answer, after which nothing further is asked; lasting ones count only
before the first answer."""
Row = dict[str, Any]
"""A row of the answers' table; `failure` is null if there is an answer."""
Key = tuple[Hashable, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Inquiry(Generic[T]):
    """What is asked, and where the answers go."""

    name: str
    """Who is asked, for messages."""
    schema: pa.Schema
    key_of: Callable[[Mapping[str, Any]], Key]
    """What a row is about."""
    about: Callable[[Key], Hashable]
    """What a failed question leaves without an answer: several questions may be about the same."""
    things: str
    """What those are, for messages: comparisons or responses."""
    answer: str
    """What an answer is, for messages and progress: verdict or rating."""
    total: int
    """Number of the things asked about."""


Answers = Callable[[Sequence[T]], list[Row]]
"""A row for each question, in their order."""


def refuse_another(what: str, name: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse a judge or a rater that is not the one in the run's configuration.

    Args:
        what: judge or rater.
        name: its name.
        now, then: what identifies it now, and did when the run was started.

    Raises:
        SeraError: its files, source or address have changed.
    """
    if now != then:
        raise SeraError(
            f"the {what} {name} is not the one that this run was started with ({now}, then {then}); restore "
            "it, or start a run under a new name"
        )


def ask(
    attempt: Attempt, inquiry: Inquiry[T], wanted: Mapping[Key, T], open: Callable[[], tuple[Answers[T], int]]
) -> dict[Key, Row]:
    """The row of every wanted question, stored before or asked for now.

    Args:
        attempt: the step; answers are its parts.
        inquiry: what is asked.
        wanted: the questions by key.
        open: who answers, and how many questions to hand over at once; called only if something is asked.

    Raises:
        SeraError: a batch without any answer, more than half of the things without one, or more than a
            twentieth for a reason that passes. What is answered stays in the store.
    """
    known = _known(attempt, inquiry)
    left = [key for key in wanted if key not in known]
    failed: dict[Key, Row] = {}
    answers, size = open() if left else (None, 1)
    for start in range(0, len(left), size):
        attempt.progress(len(wanted) - len(left) + start, len(wanted), f"{inquiry.answer}s")
        assert answers is not None
        rows = answers([wanted[key] for key in left[start : start + size]])
        answered = [row for row in rows if row["failure"] is None]
        failed |= {inquiry.key_of(row): row for row in rows if row["failure"] is not None}
        if answered:
            _store(attempt, inquiry, answered)
            known |= {inquiry.key_of(row): row for row in answered}
        _refuse_silent(inquiry, rows, failed, bool(known))
    _refuse_passing(inquiry, failed)
    attempt.use_parts(attempt.parts())
    return known | failed


def _known(attempt: Attempt, inquiry: Inquiry[T]) -> dict[Key, Row]:
    """Answers stored by any attempt at this step."""
    found: dict[Key, Row] = {}
    for part in attempt.parts():
        path = attempt.part_path(part, next(iter(part["files"])))
        for row in schema.read_table(path, inquiry.schema).to_pylist():
            found.setdefault(inquiry.key_of(row), row)
    return found


def _store(attempt: Attempt, inquiry: Inquiry[T], rows: Sequence[Row]) -> None:
    """Commit rows as the next part; if another process takes its number, as the one after."""
    number = len(attempt.parts())
    while True:
        relative = f"part-{number:05d}.parquet"
        schema.write_table(schema.from_rows(inquiry.schema, rows), attempt.write(relative))
        part = attempt.commit_part(number, [relative], {f"{inquiry.answer}s": len(rows)})
        if part["files"].get(relative, {}).get("attempt") == attempt.id:
            return
        number += 1


def _refuse_silent(
    inquiry: Inquiry[T], batch: Sequence[Row], failed: Mapping[Key, Row], has_answered: bool
) -> None:
    """Stop when nothing at all is answered, or too little to say anything.

    A continued step begins with all that failed before, so a batch without an answer says nothing if others
    were answered.

    Raises:
        SeraError: with counts by reason.
    """
    without = {inquiry.about(key): row["failure"] for key, row in failed.items()}
    lasting = frozenset() if has_answered else FAILURES.keys()
    if len(batch) >= SILENT and all(row["failure"] in PASSING | lasting for row in batch):
        raise _without_result(inquiry, f"answered none of {len(batch)} questions in a row", without)
    if len(without) > MAX_FAILED * inquiry.total:
        raise _without_result(inquiry, "failed more often than it answered", without)


def _refuse_passing(inquiry: Inquiry[T], failed: Mapping[Key, Row]) -> None:
    """Stop before the step is done while more than a few questions failed for a reason that passes.

    Raises:
        SeraError: with counts by reason.
    """
    without = {inquiry.about(key): row["failure"] for key, row in failed.items() if row["failure"] in PASSING}
    if len(without) > MAX_PASSING * inquiry.total:
        raise _without_result(inquiry, "could not answer all questions for now", without)


def _without_result(inquiry: Inquiry[T], what: str, without: Mapping[Any, str]) -> SeraError:
    counts = {reason: list(without.values()).count(reason) for reason in sorted(set(without.values()))}
    words = ", ".join(f"{count} {reason} ({FAILURES[reason]})" for reason, count in counts.items())
    return SeraError(
        f"{inquiry.name} {what}; of {inquiry.total} {inquiry.things} {len(without)} have no "
        f"{inquiry.answer}: {words}. Nothing is reported; what was answered is kept, and the same command "
        "asks only for the rest"
    )
