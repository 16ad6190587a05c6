"""Plan a run: call the functions of flows/round.py with a `do` that only looks up records."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from flows import round as sera_round
from flows.planning.estimates import (
    Estimator,
    memory_warning,
    refuse_what_cannot_fit,
    round_of,
    workload,
)
from flows.planning.forecast import PlannedRound, forecast, warnings_of
from flows.planning.subjects import made_policy, subject
from flows.round import Past, Ref, Steps
from flows.running.open_run import (
    check_template,
    load_data,
    load_messages,
    resolved,
    source_digests,
    with_engine,
)
from sera_core import steps
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import StepRecord, StepRef, StepSpec, find_record
from sera_core.artifacts.run_records import differences
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import part_numbers
from sera_core.artifacts.store import Store, open_store
from sera_core.config import AUTO, SeraConfig
from sera_core.counts import RoundCounts

UNKNOWN = "?"
"""Prefix of the digest of a step that is not done yet; unique per step."""
RESUMES = "resumes after"
"""How `why` begins for a step that another process began."""


AnswerOf = Callable[[int], Mapping[str, Any] | None]
"""The recorded review answer of a round, if any."""


def no_answer(round: int) -> None:
    """No reviews are answered."""


class Walk:
    """A `do` that lists each step as reuse, run or depends, and why."""

    def __init__(self, store_url: str) -> None:
        self.store = open_store(store_url)
        self.rows: list[dict[str, Any]] = []
        self.todo: list[tuple[dict[str, Any], StepSpec]] = []
        """Rows of the steps to do, with what each computes."""
        self.round: int | None = None
        self._seen: set[str] = set()
        self._found: dict[str, StepRecord] = {}
        self._policies: dict[StepRef, str] = {}
        """Policies in words."""

    def do(self, spec: StepSpec) -> Ref:
        """List the step. Returns a reference to it, or to its future result."""
        unknown = [name for name, ref in spec.inputs.items() if ref and _is_unknown(ref)]
        if spec.fields.get("prompts") == AUTO:
            unknown.append("the number of prompts to sample")
        record = None if unknown else find_record(self.store, spec.step, spec.key)
        key = spec.key or ""
        if record is not None:
            self._found[key] = record
        if key not in self._seen:
            self._seen.add(key)
            self.rows.append(self._row(spec, unknown, reuse=record is not None))
        ref = record.ref if record else StepRef(step=spec.step, key=key, digest=UNKNOWN + key)
        if (policy := made_policy(spec)) is not None:
            self._policies[ref] = policy
        return ref

    def look(self, ref: Ref) -> StepRecord | None:
        """The record of a step; None if it is not done."""
        if ref is None or _is_unknown(ref):
            return None
        return self._found.get(ref.key) or find_record(self.store, ref.step, ref.key)

    def add_costs(self, estimator: Estimator, rounds: Mapping[int, RoundCounts]) -> None:
        """Add the expected cost of every step to do."""
        for row, spec in self.todo:
            number = round_of(spec, row["round"])
            row |= estimator.expected(spec, None if number is None else rounds.get(number))

    def _row(self, spec: StepSpec, unknown: list[str], reuse: bool) -> dict[str, Any]:
        row: dict[str, Any] = {
            "round": self.round,
            "step": spec.step,
            "subject": subject(spec, self._policies),
            "key": None if unknown else spec.key,
        }
        cost: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "bytes": 0, "memory": None}
        if reuse:
            return row | {"status": "reuse", "why": "record in the store"} | cost
        self.todo.append((row, spec))
        row |= {"status": "depends", "why": f"on {', '.join(unknown)}"} if unknown else self._can_run(spec)
        row |= cost
        return row

    def _can_run(self, spec: StepSpec) -> dict[str, str]:
        parts = len(part_numbers(self.store, spec.path))
        why = f"{RESUMES} {parts} finished parts" if parts else "no record in the store"
        return {"status": "run", "why": why}


def _is_unknown(ref: StepRef) -> bool:
    return ref.digest.startswith(UNKNOWN)


def plan(config: SeraConfig, run: str, store_url: str) -> dict[str, Any]:
    """Every step of a run: `reuse`, `run` or `depends`, why, and its estimated cost.

    Also the counts of every round, recorded or expected (`rounds`), and what they warn of (`warnings`).

    Raises:
        InputError: a source cannot be used, or training cannot fit into memory.
    """
    records = RunStore(open_store(store_url), run)
    config = with_engine(config, records)
    digests = source_digests(config)
    check_template(config)
    history, note = _history(config, records, digests)
    with tempfile.TemporaryDirectory(prefix="sera-plan-") as scratch:
        aside = open_store(scratch)
        data = load_data(aside, config, digests)
        size = workload(config, data, aside, load_messages(aside, config, digests, data.ref))
    refuse_what_cannot_fit(config, size.shape)
    walk = Walk(store_url)
    planned = walk_rounds(config, digests, history, walk, records.given_answer)
    rounds = forecast(config, planned, size, walk.look)
    walk.add_costs(Estimator(config, records.store, records, size), {found.round: found for found in rounds})
    todo = [row for row in walk.rows if row["status"] != "reuse"]
    seconds = [row["seconds"] for row in todo]
    return {
        "run": run,
        "note": note,
        "formats": data.metrics["formats"],
        "steps": walk.rows,
        "rounds": [asdict(found) for found in rounds],
        "warnings": [*warnings_of(config, rounds), *memory_warning(todo, config.execution.device)],
        "reuse": len(walk.rows) - len(todo),
        "run_now": sum(row["status"] == "run" for row in todo),
        "depends": sum(row["status"] == "depends" for row in todo),
        "tokens": sum(row["tokens"] for row in todo),
        "seconds": None if None in seconds else round(sum(seconds), 1),
        "bytes": sum(row["bytes"] or 0 for row in todo),
        "memory": max((row["memory"] for row in todo if row["memory"] is not None), default=None),
    }


def _history(config: SeraConfig, records: RunStore, digests: Mapping[str, Any]) -> tuple[History, str | None]:
    configs = records.configs()
    if not configs:
        return History([]), None
    now = resolved(config, dict(digests))
    if sha256_json(now) == configs[-1].config_sha256:
        return records.history(), None
    changed = "; ".join(differences(configs[0].resolved, now))
    note = f"run {records.run!r} exists with another configuration ({changed}): `sera run` would refuse it; "
    return History([]), note + "this is the plan under a new --name"


def walk_rounds(
    config: SeraConfig,
    digests: Mapping[str, Any],
    history: History,
    walk: Walk,
    answer_of: AnswerOf = no_answer,
) -> list[PlannedRound]:
    """Walk every round up to the limit; future rounds count as promoted."""
    sides = sera_round.prepare(config, digests, walk.do)
    heads: list[Mapping[str, Ref]] = []
    rounds: list[int] = []
    promoted: dict[int, Mapping[str, Ref]] = {}
    walked: list[PlannedRound] = []
    planned: list[dict[str, Any]] = []
    stopped = bool(history.rounds) and history.rounds[-1].stop_reason is not None
    last = history.next_round if stopped else max(config.limits.rounds, history.next_round)
    for number in range(last):
        walk.round = number
        before = History(history.rounds[:number]) if number <= history.next_round else None
        entries = planned if before is None or not before.rounds else before.entries()
        past = Past(list(heads), dict(promoted), list(rounds))
        made = _round(config, sides, past, number, entries, walk, answer_of)
        walked.append(PlannedRound(number, past, made))
        planned = [*entries, _entry(walk, number, made)]
        if number < history.next_round:
            after = History(history.rounds[: number + 1])
            heads = [manifest.steps for manifest in after.lineage]
            rounds = [manifest.round for manifest in after.lineage]
            promoted = {m.round: m.steps for m in after.promoted}
        else:
            heads.append(made)
            rounds.append(number)
            promoted[number] = made
    return walked


def _entry(walk: Walk, number: int, made: Steps) -> dict[str, Any]:
    """The history entry of a future round; from its record if another run has done it."""
    decision = made["decision"]
    found = decision and find_record(walk.store, decision.step, decision.key)
    if not found:
        return {"round": number, "decision": "promote", "head": number}
    return {"round": number, "decision": found.metric("decision"), "head": found.metric("head_after")}


def _needs_answer(store: Store, decision: Ref) -> bool:
    """Whether a recorded decision requested a review."""
    found = decision and find_record(store, decision.step, decision.key)
    return bool(found and found.metric("ask"))


def _round(
    config: SeraConfig,
    sides: sera_round.Sides,
    past: Past,
    number: int,
    entries: list[dict[str, Any]],
    walk: Walk,
    answer_of: AnswerOf,
) -> Steps:
    made = sera_round.self_review(config, sides, past, number, walk.do, walk.look)
    made |= {"data": sides.data, "model": sides.model, "pairs": sides.pairs}
    made["policy"] = sera_round.align(config, sides, past, number, made, walk.do)
    made |= sera_round.gather_evidence(config, sides, past, number, made["mixture"], made["policy"], walk.do)
    made["decision"] = sera_round.decide(config, sides, past, number, made, entries, None, walk.do)
    if _needs_answer(walk.store, made["decision"]) and (answer := answer_of(number)) is not None:
        made["decision"] = sera_round.decide(config, sides, past, number, made, entries, answer, walk.do)
    walk.do(steps.report(number, {r: ref for r, ref in made.items() if r not in ("data", "model")}))
    return made
