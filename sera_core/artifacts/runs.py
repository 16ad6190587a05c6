"""A run: its configuration records and round manifests, and its head, best round and stop reason.

runs/<run>/lease/                 who works on it (lease.py)
runs/<run>/run-000.json           resolved configuration; later numbers only for changed limits and execution
runs/<run>/round-000.json         create-only manifest of a finished round, with the sha256 of its parent
runs/<run>/stop-000.json          the budget that ended the run under run-000.json
runs/<run>/review-000.json        a question to a person; review-000-answer.json the answer
runs/<run>/final-000.json         evidence on the test side for one best round, once the run has stopped
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from sera_core.artifacts import lease
from sera_core.artifacts.canonical import canonical_json, sha256_json
from sera_core.artifacts.manifest import StepRef
from sera_core.artifacts.measures import Metrics, is_rate
from sera_core.artifacts.records import FORMAT, StrictModel, first_wrong, read_series, read_typed, typed
from sera_core.artifacts.store import Store, create_json
from sera_core.config import SeraConfig
from sera_core.errors import InputError, StoreError
from sera_core.guards.urls import clean_sources

DecisionName = Literal["promote", "hold", "roll_back", "stop"]
STOP_REASONS = ("converged", "max_rounds", "degraded", "no_pairs", "budget", "reviewer")
HEADLESS_DECISIONS: tuple[DecisionName, ...] = ("promote", "stop")
"""Decisions allowed while no round is promoted: a hold or roll-back needs a head to keep or return to."""
ALWAYS = ("data", "model", "pairs", "scored", "human", "mixture")
"""Step roles that every round has."""
STEP_OF = {
    "data": "data",
    "model": "model",
    "pairs": "render",
    "scored": "review",
    "human": "select",
    "samples": "sample",
    "responses": "pair",
    "generated": "select",
    "mixture": "mix",
    "policy": "train",
    "evidence": "evaluate",
    "decision": "decide",
    "report": "report",
}
"""Step name of each role."""
ACCURACY = "heldout/rewards/accuracies"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunRecord(StrictModel):
    """The configuration a run was started (or re-opened) with."""

    format: int
    run: str
    config: dict[str, Any]
    config_sha256: str
    resolved: dict[str, Any]
    """The input of config_sha256: settings that change results, with paths replaced by content digests."""
    created: str

    @field_validator("config", mode="after")
    @classmethod
    def _without_secrets(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Strip passwords from URLs, which earlier versions recorded unchanged."""
        return clean_sources(config)

    @model_validator(mode="after")
    def _is_hashed(self) -> "RunRecord":
        if sha256_json(self.resolved) != self.config_sha256:
            raise ValueError("config_sha256 is not the hash of `resolved`")
        return self

    @property
    def changed(self) -> str | None:
        """The first setting that differs between `config` and `resolved`, which is hashed; or None."""
        covered = {name: value for name, value in self.resolved.items() if name != "digests"}
        return _first_other(covered, self.config, "")

    @property
    def settings(self) -> SeraConfig:
        """The validated configuration.

        Raises:
            StoreError: this version does not know a setting or value, or a setting differs from the hashed
                one; the message names the first.
        """
        try:
            config = SeraConfig.stored(self.config)
        except ValidationError as error:
            raise StoreError(
                f"run {self.run!r}: the recorded configuration cannot be read ({first_wrong(error)}); "
                "restore the record from a copy of the store, or use the version that wrote it"
            ) from error
        if self.changed is not None:
            raise StoreError(
                f"run {self.run!r}: the recorded configuration was modified ({self.changed} does not match "
                "config_sha256); restore the record from a copy of the store"
            )
        return config


def _first_other(covered: Any, config: Any, name: str) -> str | None:
    """Dotted name of the first setting that differs between the hashed and the recorded configuration."""
    if isinstance(covered, dict) and isinstance(config, dict):
        inner = [(key, value, config.get(key)) for key, value in covered.items()]
    elif isinstance(covered, list) and isinstance(config, list) and len(covered) == len(config):
        inner = [(str(n), *both) for n, both in enumerate(zip(covered, config, strict=True))]
    else:
        return None if canonical_json(covered) == canonical_json(config) else name.rstrip(".")
    found = (_first_other(was, now, f"{name}{key}.") for key, was, now in inner)
    return next((other for other in found if other is not None), None)


class Place(StrictModel):
    """Location and hash of an artifact of a round: a file, or a folder (its path ends with `/`)."""

    step: str
    key: str
    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    rows: int | None


class RoundManifest(StrictModel):
    """One finished round."""

    format: int
    run: str
    round: int
    config_sha256: str
    parent_sha256: str | None
    steps: dict[str, StepRef]
    """The round's own steps, by role (policy, scored, mixture, evidence, …)."""
    used: list[StepRef]
    """Every step the round depends on, including log-probabilities and steps shared with other rounds."""
    artifacts: dict[str, dict[str, Any]]
    """The round's main artifacts by role: step ref, path in the step, sha256, bytes, rows."""
    pairs: dict[str, int]
    target_share: float
    generated_share: float
    metrics: Metrics
    decision: DecisionName
    reason: str
    stop_reason: str | None
    accuracy: float | None
    created: str
    epoch: int | None = None
    """Epoch of the lease under which it was committed; None without a lease."""

    @model_validator(mode="after")
    def _is_whole(self) -> "RoundManifest":
        """Check the fields that every round must have."""
        if self.pairs.keys() != {"human", "generated"} or min(self.pairs.values()) < 0:
            raise ValueError("pairs: expected the counts `human` and `generated`")
        if self.stop_reason not in (None, *STOP_REASONS):
            raise ValueError(f"stop_reason: {self.stop_reason!r:.60} is unknown")
        for role, ref in self.steps.items():
            if ref.step != STEP_OF.get(role, ref.step):
                raise ValueError(f"steps.{role}: is a step {ref.step!r:.60}, not {STEP_OF[role]!r}")
        made = {(ref.step, ref.key) for ref in self.steps.values()}
        for role, held in self.artifacts.items():
            try:
                place = Place.model_validate(held)
            except ValidationError as error:
                raise ValueError(f"artifacts.{role}: {first_wrong(error)}") from error
            if (place.step, place.key) not in made:
                raise ValueError(f"artifacts.{role}: does not belong to a step of the round")
        return self

    @model_validator(mode="after")
    def _has_its_steps(self) -> "RoundManifest":
        """Check the steps that every round must have, and those of a round with a trained policy."""
        trained = () if self.stop_reason == "no_pairs" else ("policy", "evidence", "decision")
        absent = [role for role in (*ALWAYS, *trained) if role not in self.steps] if self.steps else []
        if absent:
            raise ValueError(f"steps: {absent[0]} is missing")
        if "evidence" in self.steps and not is_rate(self.metrics.get(ACCURACY)):
            raise ValueError(f"metrics: {ACCURACY} is missing")
        if "policy" in self.steps and "policy" not in self.artifacts:
            raise ValueError("artifacts: policy is missing")
        if "evidence" in self.steps and self.accuracy != self.metrics[ACCURACY]["value"]:
            raise ValueError(f"accuracy: differs from {ACCURACY}")
        return self


class Question(StrictModel):
    """`review-000.json`: what a person is asked about a round."""

    format: int
    round: int
    evidence: Metrics
    until: str
    default: DecisionName

    @field_validator("until", mode="after")
    @classmethod
    def _is_time(cls, until: str) -> str:
        if datetime.fromisoformat(until).tzinfo is None:
            raise ValueError("expected a time with a time zone")
        return until


class Answer(StrictModel):
    """`review-000-answer.json`: a person's answer, or the default after the deadline."""

    format: int
    decision: DecisionName
    note: str
    who: str
    when: str


class Stop(StrictModel):
    """`stop-000.json`: the budget that ended a run."""

    format: int
    reason: Literal["budget"]
    after: str
    created: str


class Finished(StrictModel):
    """`finished/….json`: the finished run with this configuration (its hash is the file's name)."""

    format: int
    run: str
    created: str

    @field_validator("run", mode="after")
    @classmethod
    def _is_run(cls, run: str) -> str:
        return check_name(run)


class Final(StrictModel):
    """`final-000.json`: the evidence on the test side under the policy of a round."""

    format: int
    round: int
    step: StepRef
    metrics: Metrics
    created: str


def check_name(run: str) -> str:
    """Return the name if it is a valid run name: letters, digits, dot, dash, underscore; no path.

    Raises:
        InputError: it is not.
    """
    if not _is_name(run):
        raise InputError(
            f"run name {run!r}: a name is 1 to 100 letters, digits, '.', '-' or '_', starts with a letter or "
            "digit, does not end with '.' and is not a path. Choose another with --name"
        )
    return run


def _is_name(run: str) -> bool:
    return _NAME.fullmatch(run) is not None and ".." not in run and not run.endswith(".")


class History:
    """State of a run computed from the manifests of its finished rounds."""

    def __init__(self, rounds: Sequence[RoundManifest]) -> None:
        self.rounds = list(rounds)

    @property
    def next_round(self) -> int:
        """Number of the round to do next."""
        return len(self.rounds)

    @property
    def promoted(self) -> list[RoundManifest]:
        """Rounds whose policy was promoted, in order."""
        return [r for r in self.rounds if r.decision == "promote"]

    @property
    def best(self) -> RoundManifest | None:
        """The promoted round with the largest held-out reward accuracy; the later one if tied."""
        return max(
            self.promoted,
            key=lambda r: (r.accuracy if r.accuracy is not None else -1.0, r.round),
            default=None,
        )

    @property
    def lineage(self) -> list[RoundManifest]:
        """The heads in order; a roll-back removes those after the best round so far."""
        heads: list[RoundManifest] = []
        for number, manifest in enumerate(self.rounds):
            if manifest.decision == "promote":
                heads.append(manifest)
            elif manifest.decision == "roll_back":
                best = History(self.rounds[:number]).best
                heads = [head for head in heads if best is not None and head.round <= best.round]
        return heads

    @property
    def head(self) -> RoundManifest | None:
        """The promoted round the next one starts from."""
        return self.lineage[-1] if self.lineage else None

    def entries(self) -> list[dict[str, Any]]:
        """The history as a decision sees it."""
        return [{"round": r.round, "decision": r.decision, "accuracy": r.accuracy} for r in self.rounds]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every setting that differs; None where a side lacks it."""
    a, b = flatten(old), flatten(new)
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every dotted key that differs."""
    return [f"{key}: {was!r} -> {now!r}" for key, was, now in changes(old, new)]


class RunStore:
    """The records of one run."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, check_name(run)
        self.path = f"runs/{run}"

    def configs(self) -> list[RunRecord]:
        """run-000.json and its successors."""
        found = read_series(self.store, self.path + "/run-{:03d}.json")
        return [typed(RunRecord, data, self._where(f"run-{number:03d}")) for number, data in found]

    def rounds(self) -> list[RoundManifest]:
        """Manifests of the finished rounds, in order, each checked against its parent's hash."""
        manifests: list[RoundManifest] = []
        parent = None
        for number, data in read_series(self.store, self.path + "/round-{:03d}.json"):
            manifest = typed(RoundManifest, data, self._where(f"round-{number:03d}"))
            if manifest.parent_sha256 != parent or manifest.round != number:
                raise StoreError(
                    f"{self._where(f'round-{number:03d}')}: its parent hash does not match "
                    "the manifest before it; restore both from a copy of the store"
                )
            manifests.append(manifest)
            parent = self.sha256_of_round(number)
        return manifests

    def _where(self, name: str) -> str:
        return f"{self.store.url}/{self.path}/{name}.json"

    def sha256_of_round(self, number: int) -> str | None:
        """sha256 of a round's manifest in the store; None when it does not exist."""
        data = self.store.read_bytes(f"{self.path}/round-{number:03d}.json")
        return None if data is None else hashlib.sha256(data).hexdigest()

    def test_evidence(self, round: int) -> dict[str, Any] | None:
        """The evidence on the test side under a round's policy, if it was recorded."""
        found = read_typed(self.store, f"{self.path}/final-{round:03d}.json", Final)
        if found is not None and found.round != round:
            raise StoreError(
                f"{self._where(f'final-{round:03d}')}: is the record of round {found.round}; restore it from "
                "a copy of the store"
            )
        return None if found is None else found.model_dump()

    def history(self) -> History:
        """The run's history."""
        return History(self.rounds())

    def open(self, config: SeraConfig, resolved: Mapping[str, Any]) -> RunRecord:
        """Create the run, or open it with the same configuration; record changed limits and execution.

        Raises:
            InputError: a setting that changes results differs; the message lists the differences.
        """
        dump = config.model_dump(mode="json")
        sha = sha256_json(resolved)
        records = self.configs()
        if records and records[-1].config_sha256 != sha:
            lines = "\n  ".join(differences(records[0].resolved, resolved))
            raise InputError(
                f"run {self.run!r} exists with another configuration:\n  {lines}\n"
                "Undo the change, or start another run with --name"
            )
        if records and sha256_json(records[-1].config) == sha256_json(dump):
            return records[-1]
        record = RunRecord(
            format=FORMAT,
            run=self.run,
            config=dump,
            config_sha256=sha,
            resolved=dict(resolved),
            created=now(),
        )
        winner, _ = create_json(
            self.store, f"{self.path}/run-{len(records):03d}.json", record.model_dump(mode="json")
        )
        return typed(RunRecord, winner, self._where(f"run-{len(records):03d}"))

    def commit_round(self, manifest: RoundManifest) -> RoundManifest:
        """Create the round's manifest, unless it exists; returns the one in the store.

        Raises:
            BusyError: another process took over this process's lease on the run.
        """
        number = manifest.round
        parent = self.sha256_of_round(number - 1) if number else None
        data = manifest.model_copy(update={"parent_sha256": parent, "epoch": self._epoch()})
        winner, ours = create_json(
            self.store, f"{self.path}/round-{number:03d}.json", data.model_dump(mode="json")
        )
        if not ours:
            self._epoch()
        return typed(RoundManifest, winner, self._where(f"round-{number:03d}"))

    def _epoch(self) -> int | None:
        """Number of the epoch this process holds on the run, after a check that it is the newest; or None."""
        held = lease.held(self.store, self.run)
        if held is None:
            return None
        held.check()
        return held.number

    def record_stop(self, reason: str, after: str) -> None:
        """Record that the budget ended the run under its current configuration.

        Raises:
            BusyError: another process took over this process's lease on the run.
        """
        self._epoch()
        number = len(self.configs()) - 1
        record = {"format": FORMAT, "reason": reason, "after": after, "created": now()}
        create_json(self.store, f"{self.path}/stop-{number:03d}.json", record)

    def stop_reason(self) -> str | None:
        """Why the run stopped, None while it is open. Raising a limit re-opens it."""
        state = self.state()
        return None if state in ("open", "waiting") else state

    def state(self) -> str:
        """`open`, `waiting` (for a person's answer), or why the run stopped."""
        records, history = self.configs(), self.history()
        if history.rounds and history.rounds[-1].stop_reason:
            return history.rounds[-1].stop_reason
        if self._asks(history.next_round) is not None:
            return "waiting"
        if not records:
            return "open"
        limits = records[-1].settings.limits
        if history.next_round >= limits.rounds:
            return "max_rounds"
        stop = self.stop()
        return "open" if stop is None else stop.reason

    def stop(self) -> Stop | None:
        """The budget that ended the run under its current configuration, or None."""
        return read_typed(self.store, f"{self.path}/stop-{len(self.configs()) - 1:03d}.json", Stop)

    def decisions(self) -> tuple[DecisionName, ...]:
        """The allowed answers for the open round: those that leave the run with a head, or end it."""
        return HEADLESS_DECISIONS if self.history().head is None else get_args(DecisionName)

    def _check_decision(self, round: int, decision: str) -> None:
        offered = self.decisions()
        if decision not in offered:
            raise InputError(
                f"run {self.run!r}, round {round}: {decision!r} is not allowed, because no round is promoted "
                f"yet and the run would be without a head; answer {' or '.join(offered)}"
            )

    def ask(self, round: int, evidence: Mapping[str, Any], hours: float, default: str) -> dict[str, Any]:
        """Record the question whether to promote a round; the deadline counts from the first record.

        Raises:
            InputError: the default would leave the run without a head.
        """
        self._check_decision(round, default)
        until = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
        question = {
            "format": FORMAT,
            "round": round,
            "evidence": evidence,
            "until": until,
            "default": default,
        }
        record, _ = create_json(self.store, f"{self.path}/review-{round:03d}.json", question)
        return record

    def answer(self, round: int, decision: str, note: str, who: str) -> dict[str, Any]:
        """Record the answer to a question; the first answer stands.

        Raises:
            InputError: the answer would leave the run without a head.
        """
        self._check_decision(round, decision)
        answer = {"format": FORMAT, "decision": decision, "note": note, "who": who, "when": now()}
        record, _ = create_json(self.store, f"{self.path}/review-{round:03d}-answer.json", answer)
        return record

    def question(self, round: int) -> dict[str, Any] | None:
        """The question asked of a round, or None."""
        found = read_typed(self.store, f"{self.path}/review-{round:03d}.json", Question)
        return None if found is None else found.model_dump()

    def given_answer(self, round: int) -> dict[str, Any] | None:
        """The recorded answer, or None; ignores the deadline."""
        found = read_typed(self.store, f"{self.path}/review-{round:03d}-answer.json", Answer)
        return None if found is None else found.model_dump()

    def answer_of(self, round: int) -> dict[str, Any] | None:
        """The answer to a round's question; after the deadline, record and return the default."""
        found = self.given_answer(round)
        question = self.question(round)
        if found is None and question and datetime.fromisoformat(question["until"]) < datetime.now(UTC):
            default, note = question["default"], "no answer before the deadline"
            if default not in self.decisions():  # a question of an older version; METHOD's rule for round 0
                default, note = "promote", f"{note}; the default {default} would leave the run without a head"
            return self.answer(round, default, note, "deadline")
        return found

    def waiting(self) -> dict[str, Any] | None:
        """The unanswered question of the open round: {"round", "until"}, or None."""
        return self._asks(self.history().next_round)

    def _asks(self, number: int) -> dict[str, Any] | None:
        question = self.question(number)
        if question is None or self.answer_of(number) is not None:
            return None
        return {"round": number, "until": question["until"]}


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def list_runs(store: Store) -> list[str]:
    """Names of the runs in a store, for display."""
    return [name for name in store.names("runs") if _is_name(name)]
