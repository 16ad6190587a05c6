"""Ask a judge about pairs of answers, and measure a judge against human labels."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import finite
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.step import Attempt, Work
from sera_core.judges.comparison import Judge, Verdict
from sera_core.judges.functions import FunctionJudge, constant, word_count
from sera_core.judges.named import Asking, NamedJudge, Opening, find_judge
from sera_core.judges.names import CONSTANT, WORD_COUNT
from sera_core.judges.verdicts import ORDERS, Item, Row, key_of, told
from sera_core.method.judged import Judged, better_than, label_kappa, longer_preferred, order_flips, wins
from tasks.asking import Answers, Inquiry, Key, ask, refuse_another
from tasks.engines.local_chat import open_generate

PAIR = ["pair_id", "prompt_id", "prompt", "chosen", "rejected"]
VERDICTS, CALIBRATION = "verdicts.parquet", "calibration.json"
Asked = tuple[Item, str]
"""A comparison in one order."""


def judge_answers(items: Sequence[Item], named: NamedJudge) -> Work:
    """The work of the step `judge`: verdicts.parquet."""

    def work(attempt: Attempt) -> list[str]:
        _record(attempt, _ask(attempt, items, named))
        return [VERDICTS]

    return work


def judge_samples(attempt: Attempt) -> list[str]:
    """The step `judge` of a round: verdicts.parquet, of answers to held-out prompts.

    Raises:
        SeraError: the judge is another one now, or failed more often than it answered.
    """
    first, second = attempt.input("samples"), attempt.input("against")
    items, _ = paired_items(first, second, attempt.input("rendered").path("heldout.parquet"))
    return judge_answers(items, _named(attempt))(attempt)


def calibrate_on_heldout(attempt: Attempt) -> list[str]:
    """The step `calibrate` of a run: `calibrate` on the held-out pairs.

    Raises:
        SeraError: as `judge_samples`.
    """
    rows = schema.iter_rows(attempt.input("rendered").path("heldout.parquet"), PAIR)
    return calibrate([Item.labelled(**row) for row in rows], _named(attempt))(attempt)


def _named(attempt: Attempt) -> NamedJudge:
    """The judge, the same one as in the run's configuration.

    Raises:
        SeraError: its files, source or address have changed since the run was started.
    """
    named = find_judge(attempt.spec.where["judge"], Asking())
    refuse_another("judge", named.name, named.identity, attempt.fields["judge"])
    return named


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
        attempt.metrics |= {
            "calibrated": found["calibrated"],
            "agreement": finite(found["measures"]["agreement"]),
            f"agreement/{WORD_COUNT}": finite(found["controls"][WORD_COUNT]["agreement"]),
        }
        return [VERDICTS, CALIBRATION]

    return work


# ----------------------------------------------------------------------------------------------------- items


def paired_items(first: Artifact, second: Artifact, prompts: Path) -> tuple[list[Item], int]:
    """Two policies' answers to the same prompt and sample number, and how many have no counterpart.

    Args:
        first, second: steps with their answers.
        prompts: file with the prompts.
    """
    one, other = _responses(first), _responses(second)
    both = sorted(one.keys() & other.keys())
    asked = {row["prompt_id"]: row["prompt"] for row in schema.iter_rows(prompts, ["prompt_id", "prompt"])}
    items = [Item(prompt, asked[prompt], one[prompt, n], other[prompt, n], n) for prompt, n in both]
    return items, len(one) + len(other) - 2 * len(both)


def _responses(samples: Artifact) -> dict[tuple[str, int], str]:
    rows = schema.iter_rows(samples.path("responses.parquet"), ["prompt_id", "sample", "response"])
    return {(row["prompt_id"], row["sample"]): row["response"] for row in rows}


# ---------------------------------------------------------------------------------------------------- asking


def _ask(attempt: Attempt, items: Sequence[Item], named: NamedJudge) -> list[Row]:
    """A row for every comparison and order, in the items' order; equal answers are ties without asking."""
    wanted: dict[Key, Asked] = {
        _key(item, order): (item, order) for item in items for order in ORDERS if not item.is_equal
    }
    inquiry: Inquiry[Asked] = Inquiry(
        f"the judge {named.name}",
        schema.VERDICTS,
        key_of,
        lambda key: key[:3],
        "comparisons",
        "verdict",
        len(wanted) // 2,
    )

    def open() -> tuple[Answers[Asked], int]:
        judge = named.open(Opening(open_generate))
        return lambda batch: _batch(judge, batch), judge.batch

    found = ask(attempt, inquiry, wanted, open)
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


def _record(attempt: Attempt, rows: Sequence[Row]) -> None:
    """Write verdicts.parquet, its counts and metrics."""
    schema.write_table(schema.from_rows(schema.VERDICTS, rows), attempt.write(VERDICTS))
    found = told(rows)
    counts = found.counts
    for name in ("comparisons", "equal", "asked", "answered"):
        attempt.counts[name] = counts[name]
    attempt.counts.update({f"failed/{reason}": count for reason, count in found.failed.items()})
    for name, count in (found.tokens or {}).items():
        attempt.metrics[f"judge/{name}_tokens"] = count  # no limit of the run counts them


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
