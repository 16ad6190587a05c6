"""Ask a judge about pairs of answers, and measure a judge against human labels.

Verdicts are stored after each batch, so an interrupted step continues without asking for them again. Failures
are not stored before the step is done: the next attempt asks about them again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import finite
from sera_core.artifacts.step import Attempt, Work
from sera_core.errors import SeraError
from sera_core.judges.comparison import FAILURES, Judge, Verdict
from sera_core.judges.functions import FunctionJudge, constant, word_count
from sera_core.judges.named import CONSTANT, WORD_COUNT, NamedJudge
from sera_core.judges.verdicts import ORDERS, Item, Key, Row, key_of, told
from sera_core.method.judged import Judged, better_than, label_kappa, longer_preferred, order_flips, wins

VERDICTS, CALIBRATION = "verdicts.parquet", "calibration.json"
MAX_FAILED = 0.5
"""Share of the comparisons asked about that may stay without a verdict."""
MAX_PASSING = 0.05
"""Share of the comparisons that may stay without a verdict for a reason that passes."""
PASSING = frozenset({"connection", "timeout", "rate_limited", "server_error"})
"""Failures that the same question may not have an hour later."""
SILENT = 16
"""Failures in one batch, without any verdict, after which a judge is not asked further; lasting ones count
only before its first verdict."""
Asked = tuple[Item, str]
"""A comparison in one order."""


def judge_answers(items: Sequence[Item], named: NamedJudge) -> Work:
    """The work of the step `judge`: verdicts.parquet."""

    def work(attempt: Attempt) -> list[str]:
        _record(attempt, _ask(attempt, items, named))
        return [VERDICTS]

    return work


def calibrate(items: Sequence[Item], named: NamedJudge) -> Work:
    """The work of the step `calibrate`: verdicts.parquet of the judge, and calibration.json.

    Args:
        items: human-labelled pairs, the chosen answer first.
        named: the judge.
    """

    def work(attempt: Attempt) -> list[str]:
        rows = _ask(attempt, items, named)
        _record(attempt, rows)
        found = calibration(rows, items)
        text = json.dumps(finite(found), indent=1, sort_keys=True) + "\n"
        attempt.write(CALIBRATION).write_text(text, encoding="utf-8", newline="\n")
        attempt.metrics |= {"calibrated": found["calibrated"]}
        return [VERDICTS, CALIBRATION]

    return work


# ---------------------------------------------------------------------------------------------------- asking


def _ask(attempt: Attempt, items: Sequence[Item], named: NamedJudge) -> list[Row]:
    """A row for every comparison and order, in the items' order.

    Raises:
        SeraError: a batch in which the judge could not be reached, more than half of the comparisons without
            a verdict, or more than a twentieth for a reason that passes.
    """
    wanted = [(item, order) for item in items for order in ORDERS if not item.is_equal]
    known = _known(attempt)
    left = [(item, order) for item, order in wanted if _key(item, order) not in known]
    failed: dict[Key, Row] = {}
    judge = named.open() if left else None
    size = max(1, len(left)) if judge is None else judge.batch
    for start in range(0, len(left), size):
        attempt.progress(len(wanted) - len(left) + start, len(wanted), "verdicts")
        assert judge is not None
        rows = _batch(judge, left[start : start + size])
        answered = [row for row in rows if row["failure"] is None]
        failed |= {key_of(row): row for row in rows if row["failure"] is not None}
        if answered:
            _store(attempt, answered)
            known |= {key_of(row): row for row in answered}
        _refuse_silent(named.name, rows, failed, len(wanted) // 2, bool(known))
    _refuse_passing(named.name, failed, len(wanted) // 2)
    attempt.use_parts(attempt.parts())
    found = known | failed
    return [
        item.row(order, Verdict("tie")) if item.is_equal else found[_key(item, order)]
        for item in items
        for order in ORDERS
    ]


def _key(item: Item, order: str) -> Key:
    return item.prompt_id, item.pair_id, item.sample, order


def _batch(judge: Judge, batch: Sequence[Asked]) -> list[Row]:
    verdicts = judge.judge([item.comparison(order) for item, order in batch])
    return [item.row(order, verdict) for (item, order), verdict in zip(batch, verdicts, strict=True)]


def _known(attempt: Attempt) -> dict[Key, Row]:
    """Verdicts stored by any attempt at this step."""
    found: dict[Key, Row] = {}
    for part in attempt.parts():
        path = attempt.part_path(part, next(iter(part["files"])))
        for row in schema.read_table(path, schema.VERDICTS).to_pylist():
            found.setdefault(key_of(row), row)
    return found


def _store(attempt: Attempt, rows: Sequence[Row]) -> None:
    """Commit rows as the next part; if another process takes its number, as the one after."""
    number = len(attempt.parts())
    while True:
        relative = f"part-{number:05d}.parquet"
        schema.write_table(schema.from_rows(schema.VERDICTS, rows), attempt.write(relative))
        part = attempt.commit_part(number, [relative], {"verdicts": len(rows)})
        if part["files"].get(relative, {}).get("attempt") == attempt.id:
            return
        number += 1


def _refuse_silent(
    name: str, batch: Sequence[Row], failed: Mapping[Key, Row], comparisons: int, has_answered: bool
) -> None:
    """Stop when the judge answers nothing at all, or too little to say anything.

    A continued step begins with all that failed before, so a batch without a verdict says nothing if the
    judge has answered others.

    Raises:
        SeraError: with counts by reason. What is answered stays in the store.
    """
    without = {key[:3]: row["failure"] for key, row in failed.items()}
    lasting = frozenset() if has_answered else FAILURES.keys()
    if len(batch) >= SILENT and all(row["failure"] in PASSING | lasting for row in batch):
        raise _without_result(name, f"answered none of {len(batch)} questions in a row", without, comparisons)
    if len(without) > MAX_FAILED * comparisons:
        raise _without_result(name, "failed more often than it answered", without, comparisons)


def _refuse_passing(name: str, failed: Mapping[Key, Row], comparisons: int) -> None:
    """Stop before the step is done while more than a few comparisons failed for a reason that passes.

    Raises:
        SeraError: with counts by reason. What is answered stays in the store.
    """
    without = {key[:3]: row["failure"] for key, row in failed.items() if row["failure"] in PASSING}
    if len(without) > MAX_PASSING * comparisons:
        raise _without_result(name, "could not answer all questions for now", without, comparisons)


def _without_result(name: str, what: str, without: Mapping[Any, str], comparisons: int) -> SeraError:
    counts = {reason: list(without.values()).count(reason) for reason in sorted(set(without.values()))}
    words = ", ".join(f"{count} {reason} ({FAILURES[reason]})" for reason, count in counts.items())
    return SeraError(
        f"the judge {name} {what}; of {comparisons} comparisons {len(without)} have no verdict: {words}. "
        "Nothing is reported; what was answered is kept, and the same command asks only for the rest"
    )


def _record(attempt: Attempt, rows: Sequence[Row]) -> None:
    """Write verdicts.parquet, its counts and metrics."""
    schema.write_table(schema.from_rows(schema.VERDICTS, rows), attempt.write(VERDICTS))
    found = told(rows)
    counts = found.counts
    for name in ("comparisons", "equal", "asked", "answered"):
        attempt.counts[name] = counts[name]
    attempt.counts.update({f"failed/{reason}": count for reason, count in found.failed.items()})
    for name, count in (found.tokens or {}).items():
        attempt.metrics[f"tokens/judge_{name}"] = count


# ----------------------------------------------------------------------------------------------- calibration


def calibration(rows: Sequence[Row], items: Sequence[Item]) -> dict[str, Any]:
    """How well a judge agrees with people, beside the word count and a constant judge on the same pairs.

    It is calibrated if it agrees more often than the word count and than chance: the interval of the paired
    difference lies above 0, that of the agreement above 0.5, which the constant judge has.
    """
    found = told(rows)
    answered = {row["pair_id"] for row in rows} - {row["pair_id"] for row in rows if row["failure"]}
    same = [item for item in items if item.pair_id in answered]
    controls = {
        WORD_COUNT: _control(same, FunctionJudge(WORD_COUNT, word_count)),
        CONSTANT: _control(same, FunctionJudge(CONSTANT, constant)),
    }
    gain = better_than(found.judged, controls[WORD_COUNT])
    return {
        **found.counts,
        "prompts": len(np.unique(found.judged.groups)),
        "measures": _measures(found.judged),
        "controls": {judge: _measures(judged) for judge, judged in controls.items()},
        "better_than_word_count": asdict(gain),
        "calibrated": bool(gain.low > 0 and wins(found.judged).low > 0.5),
    }


def _control(items: Sequence[Item], judge: Judge) -> Judged:
    asked = [(item, order) for item in items for order in ORDERS]
    return told(_batch(judge, asked)).judged


MEASURES: dict[str, Callable[[Judged], Any]] = {
    "agreement": wins,
    "kappa": label_kappa,
    "order_flips": order_flips,
    "longer_preferred": longer_preferred,
}
"""What is measured of a judge on labelled pairs; with the chosen answer first, a win agrees with people."""


def _measures(judged: Judged) -> dict[str, Any]:
    return {name: asdict(measure(judged)) for name, measure in MEASURES.items()}
