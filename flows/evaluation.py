"""Compare the answers of two rounds by an independent judge, and calibrate a judge on labelled pairs.

Nothing here decides about a round; a run decides by win rate with `decide.metric` (flows/round.py).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.display.progress import reporter
from flows.running.aside import doing_aside
from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.lease import claim
from sera_core.artifacts.manifest import Artifact, StepRecord, StepRef, StepSpec, find_record
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import Work, make_step
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig
from sera_core.data.preferences import Pair
from sera_core.data.sources import source_digest
from sera_core.errors import InputError
from sera_core.judges.named import NamedJudge
from sera_core.judges.verdicts import (
    CALIBRATE_STEP,
    PROMPT_SET_STEP,
    Item,
    Told,
    newest_calibration,
    told,
)
from tasks.judging import CALIBRATION, VERDICTS, calibrate, judge_answers, paired_items
from tasks.prompt_set import load_prompt_set

PROMPT_SET_VERSION = 1
"""Raise it when `tasks.prompt_set` changes what it writes."""
Tell = Callable[[str], None]
NOT_CALIBRATED, UNCALIBRATED, CALIBRATED = "not calibrated", "uncalibrated", "calibrated"
"""A judge that was never measured, one not better than the word count, one that is."""


def evaluate_rounds(
    records: RunStore,
    round: int | None,
    against: int | None,
    named: NamedJudge,
    limit: int | None,
    tell: Tell,
    prompts: str | None = None,
) -> dict[str, Any]:
    """The value of `sera evaluate RUN --json`: how often a round's answers are preferred.

    Args:
        records: the run.
        round: the judged round; None: the head.
        against: the round whose answers it is compared with; None: the start policy, only with `prompts`.
        named: the judge.
        limit: compare the answers to this many prompts; None: all.
        tell: called with what this process waits for.
        prompts: file with prompts that both policies answer now; None: the held-out answers of the run.

    Raises:
        InputError: no such round, or the rounds have no held-out prompt in common.
        SeraError: the judge failed more often than it answered.
    """
    judged = _head(records) if round is None else round
    if against is None and prompts is None:
        raise InputError(
            "--against start: the start policy answered no held-out prompts; give prompts to answer with "
            "--prompts"
        )
    if judged == against:
        what = "the head" if round is None else "--round"
        raise InputError(
            f"{what} and --against are the same round, {against}; name another with --round or --against"
        )
    if prompts is None:
        assert against is not None
        first, second = (answers_of(evidence_of(records, number)) for number in (judged, against))
    else:
        first, second = set_answers(records, prompts, [judged, against])
    answers = judged_answers(records.store, first, second, named, limit, tell)
    return {
        "run": records.run,
        "round": judged,
        "against": "start" if against is None else against,
        "answers": "held-out" if prompts is None else Path(prompts).name,
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
    store: Store, first: "Answers", second: "Answers", named: NamedJudge, limit: int | None, tell: Tell
) -> JudgedAnswers:
    """Ask a judge about two rounds, of one run or of two; verdicts in the store are not asked for again.

    Args:
        store: the store.
        first, second: their answers, to the same prompts.
        named: the judge.
        limit: compare the answers to this many prompts; None: all.
        tell: called with what this process waits for.

    Raises:
        InputError: the rounds have no held-out prompt in common.
        SeraError: the judge failed more often than it answered.
    """
    prompts = Artifact(store, first.prompts).path(first.file)
    items, unpaired = paired_items(Artifact(store, first.samples), Artifact(store, second.samples), prompts)
    if not items:
        raise InputError(
            "the two rounds have answered no held-out prompt in common; older versions of sera-flow drew "
            "other prompts in each round"
        )
    limited = set(sorted({item.prompt_id for item in items})[:limit])
    chosen = [item for item in items if item.prompt_id in limited]
    spec = steps.judge(named.identity, first.samples, second.samples, first.prompts, named.name, limit)
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
    spec = StepSpec(step=CALIBRATE_STEP, version=steps.VERSIONS[CALIBRATE_STEP], fields=fields, inputs={})
    items = [Item.labelled(p.pair_id, p.prompt_id, p.prompt, p.chosen, p.rejected) for p in chosen]
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


@dataclass(frozen=True)
class Answers:
    """One round's answers: its samples, and the step and file with their prompts."""

    samples: StepRef
    prompts: StepRef
    file: str


def answers_of(evidence: StepRecord) -> Answers:
    """The held-out answers behind a round's evidence."""
    return Answers(evidence.inputs["samples"], evidence.inputs["rendered"], "heldout.parquet")


def set_answers(records: RunStore, prompts: str, rounds: Sequence[int | None]) -> list[Answers]:
    """Answers of rounds' policies to a file of prompts, sampled now or from the store.

    Args:
        records: the run; its sampling settings are used.
        prompts: the file.
        rounds: numbers of rounds; None: the start policy.

    Raises:
        InputError: no such round or policy, a malformed file, or prompts that the run trains on.
    """
    config, made = records.configs()[-1].settings, records.rounds()
    for number in rounds:
        if number is not None and (not 0 <= number < len(made) or "policy" not in made[number].steps):
            raise InputError(f"round {number}: run {records.run!r} has no policy of that round")
    first = made[0].steps
    do = doing_aside(records.store, config.execution, f"answers to {Path(prompts).name}")
    fields: dict[str, Any] = {
        "digest": source_digest(prompts),
        "max_prompt_tokens": config.data.max_prompt_tokens,
    }
    if config.model.template_kwargs:
        fields["template_kwargs"] = config.model.template_kwargs
    inputs: dict[str, StepRef | None] = {"model": first["model"], "rendered": first["pairs"]}
    spec = StepSpec(step=PROMPT_SET_STEP, version=PROMPT_SET_VERSION, fields=fields, inputs=inputs,
                    where={"file": prompts})  # fmt: skip
    if (record := find_record(records.store, spec.step, spec.key)) is None:
        record = make_step(records.store, spec, load_prompt_set, ExecutionConfig())
    found = []
    for number in rounds:
        policy = first["model"] if number is None else made[number].steps["policy"]
        samples = do(steps.sample_prompt_set(config, policy, first["model"], record.ref))
        found.append(Answers(samples, record.ref, "prompts.parquet"))
    return found
