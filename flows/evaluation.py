"""Compare the answers of two rounds by an independent judge, and calibrate a judge on labelled pairs.

Nothing here decides about a round.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.display.progress import reporter
from sera_core.artifacts import schema
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.lease import claim
from sera_core.artifacts.manifest import Artifact, StepRecord, StepSpec, find_record
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import Work, make_step
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig
from sera_core.data.preferences import Pair
from sera_core.errors import InputError
from sera_core.judges.named import NamedJudge
from sera_core.judges.verdicts import CALIBRATE_STEP, JUDGE_STEP, Item, Told, newest_calibration, told
from tasks.judging import CALIBRATION, VERDICTS, calibrate, judge_answers

VERSIONS = {JUDGE_STEP: 1, CALIBRATE_STEP: 1}
"""Raise one when its work changes what it writes."""
Tell = Callable[[str], None]
NOT_CALIBRATED, UNCALIBRATED, CALIBRATED = "not calibrated", "uncalibrated", "calibrated"
"""A judge that was never measured, one not better than the word count, one that is."""


def evaluate_rounds(
    records: RunStore, round: int | None, against: int, named: NamedJudge, limit: int | None, tell: Tell
) -> dict[str, Any]:
    """The value of `sera evaluate RUN --json`: how often a round's held-out answers are preferred.

    Args:
        records: the run.
        round: the judged round; None: the head.
        against: the round whose answers it is compared with.
        named: the judge.
        limit: compare the answers to this many prompts; None: all.
        tell: called with what this process waits for.

    Raises:
        InputError: no such round, or the rounds have no held-out prompt in common.
        SeraError: the judge failed more often than it answered.
    """
    judged = _head(records) if round is None else round
    if judged == against:
        what = "the head" if round is None else "--round"
        raise InputError(
            f"{what} and --against are the same round, {against}; name another with --round or --against"
        )
    first, second = (evidence_of(records, number) for number in (judged, against))
    answers = judged_answers(records.store, first, second, named, limit, tell)
    return {
        "run": records.run,
        "round": judged,
        "against": against,
        "judge": named.name,
        "prompts": len({item.prompt_id for item in answers.items}),
        "unpaired": answers.unpaired,
        **answers.told.counts,
        **answers.told.figures,
        "calibration": calibration_of(records.store, named),
        "step": answers.step,
    }


@dataclass(frozen=True)
class JudgedAnswers:
    """The answers of two rounds to the same held-out prompts, and what a judge says of them."""

    items: list[Item]
    unpaired: int
    """Answers without a counterpart."""
    told: Told
    step: str
    """Key of the step."""


def judged_answers(
    store: Store, first: StepRecord, second: StepRecord, named: NamedJudge, limit: int | None, tell: Tell
) -> JudgedAnswers:
    """Ask a judge about two rounds, of one run or of two; verdicts in the store are not asked for again.

    Args:
        store: the store.
        first, second: the rounds' evidence (`evidence_of`).
        named: the judge.
        limit: compare the answers to this many prompts; None: all.
        tell: called with what this process waits for.

    Raises:
        InputError: the rounds have no held-out prompt in common.
        SeraError: the judge failed more often than it answered.
    """
    items, unpaired = _items(store, first, second)
    if not items:
        raise InputError(
            "the two rounds have answered no held-out prompt in common; older versions of sera-flow drew "
            "other prompts in each round"
        )
    prompts = set(sorted({item.prompt_id for item in items})[:limit])
    chosen = [item for item in items if item.prompt_id in prompts]
    inputs = {
        "samples": first.inputs["samples"],
        "against": second.inputs["samples"],
        "rendered": first.inputs["rendered"],
    }
    fields = {"judge": named.identity, "limit": limit}
    spec = StepSpec(step=JUDGE_STEP, version=VERSIONS[JUDGE_STEP], fields=fields, inputs=dict(inputs))
    record = _done(store, spec, judge_answers(chosen, named), tell)
    rows = schema.read_table(Artifact(store, record.ref).path(VERDICTS), schema.VERDICTS).to_pylist()
    return JudgedAnswers(chosen, unpaired, told(rows), record.key)


def calibrate_judge(
    store_url: str, pairs: Sequence[Pair], named: NamedJudge, limit: int | None, tell: Tell
) -> dict[str, Any]:
    """The value of `sera evaluate --calibrate --json`: how well a judge agrees with human labels.

    Args:
        store_url: folder or URL of the store.
        pairs: human-labelled pairs.
        named: the judge.
        limit: use this many pairs, in the order of their ids; None: all.
        tell: called with what this process waits for.

    Raises:
        SeraError: the judge failed more often than it answered.
    """
    store = open_store(store_url)
    chosen = sorted(pairs, key=lambda pair: pair.pair_id)[:limit]
    fields = {"judge": named.identity, "pairs_sha256": sha256_json([pair.pair_id for pair in chosen])}
    spec = StepSpec(step=CALIBRATE_STEP, version=VERSIONS[CALIBRATE_STEP], fields=fields, inputs={})
    items = [_item_of(pair) for pair in chosen]
    record = _done(store, spec, calibrate(items, named), tell)
    found = _calibration(Artifact(store, record.ref))
    return {"judge": named.name, "pairs": len(pairs), **found, "step": record.key}


def calibration_of(store: Store, named: NamedJudge) -> dict[str, Any]:
    """The newest calibration of a judge in the store, or that there is none."""
    artifact = newest_calibration(store, named.identity)
    return {"status": NOT_CALIBRATED} if artifact is None else _calibration(artifact)


def _calibration(artifact: Artifact) -> dict[str, Any]:
    found = json.loads(artifact.path(CALIBRATION).read_text(encoding="utf-8"))
    return {"status": CALIBRATED if found["calibrated"] else UNCALIBRATED, **found}


def _done(store: Store, spec: StepSpec, work: Work, tell: Tell) -> StepRecord:
    """The record of the step, from the store or made now."""
    if (record := find_record(store, spec.step, spec.key)) is not None:
        return record
    with claim(store, spec, tell) as record, reporter("ask the judge") as progress:
        return record or make_step(store, spec, work, ExecutionConfig(), progress)


# ------------------------------------------------------------------------------------------------------ items


def _head(records: RunStore) -> int:
    head = records.history().head
    if head is None:
        raise InputError(f"run {records.run!r}: no round is promoted yet; choose one with --round")
    return head.round


def evidence_of(records: RunStore, number: int) -> StepRecord:
    """The evidence of a round whose policy answered held-out prompts."""
    rounds = records.rounds()
    if not 0 <= number < len(rounds):
        have = f"rounds 0 to {len(rounds) - 1}" if rounds else "no finished round"
        raise InputError(f"round {number}: run {records.run!r} has {have}")
    ref = rounds[number].steps.get("evidence")
    record = None if ref is None else Artifact(records.store, ref).record
    if record is None or "samples" not in record.inputs:
        raise InputError(
            f"round {number} of {records.run!r} has no held-out answers; a round that trains a policy has "
            "them unless evaluate.prompts is 0"
        )
    return record


def _items(store: Store, first: StepRecord, second: StepRecord) -> tuple[list[Item], int]:
    """Answers of two rounds to the same prompt and sample number, and how many have no counterpart."""
    one, other = (_responses(store, record) for record in (first, second))
    both = sorted(one.keys() & other.keys())
    prompts = _prompts(Artifact(store, first.inputs["rendered"]).path("heldout.parquet"))
    items = [Item(prompt, prompts[prompt], one[prompt, n], other[prompt, n], n) for prompt, n in both]
    return items, len(one) + len(other) - 2 * len(both)


def _responses(store: Store, record: StepRecord) -> dict[tuple[str, int], str]:
    path = Artifact(store, record.inputs["samples"]).path("responses.parquet")
    rows = schema.iter_rows(path, ["prompt_id", "sample", "response"])
    return {(row["prompt_id"], row["sample"]): row["response"] for row in rows}


def _prompts(path: Path) -> dict[str, list[dict[str, str]]]:
    rows = schema.iter_rows(path, ["prompt_id", "prompt"])
    return {row["prompt_id"]: row["prompt"] for row in rows}


def _item_of(pair: Pair) -> Item:
    """A labelled pair, the chosen answer first."""
    chosen, rejected = pair.chosen[0]["content"], pair.rejected[0]["content"]
    return Item(pair.prompt_id, pair.prompt, chosen, rejected, pair_id=pair.pair_id)
