"""The records of a run: its configuration, the manifest of a round, a question, an answer, a stop, a final.

`sera_core.artifacts.runs` says where each is stored.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from sera_core.artifacts.canonical import canonical_json, sha256_json
from sera_core.artifacts.manifest import StepRef
from sera_core.artifacts.measures import Metrics, is_rate
from sera_core.artifacts.records import StrictModel, first_wrong
from sera_core.config import SeraConfig
from sera_core.errors import InputError, StoreError
from sera_core.guards.urls import clean_sources
from sera_core.method.decisions import STOP_REASONS

DecisionName = Literal["promote", "hold", "roll_back", "stop"]
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
    "ratings": "rate",
    "responses": "pair",
    "generated": "select",
    "mixture": "mix",
    "policy": "train",
    "evidence": "evaluate",
    "verdicts": "judge",
    "capabilities": "capabilities",
    "start_capabilities": "capabilities",
    "decision": "decide",
    "report": "report",
}
"""Step name of each role."""
SFT = "sft"
"""The step that gives the start policy where the model is fine-tuned before round 0."""
CANDIDATES = "candidates"
"""The step that gives samples and ratings where they come from a file."""
ACCURACY = "heldout/rewards/accuracies"
BEST, HEAD = "best_round", "head_after"
"""Metrics of a decision: the best promoted round and the head after it, by number."""
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
            if role in ("samples", "ratings") and ref.step == CANDIDATES:
                continue
            if role == "model" and ref.step == SFT:
                continue
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
    if not is_run_name(run):
        raise InputError(
            f"run name {run!r}: a name is 1 to 100 letters, digits, '.', '-' or '_', starts with a letter or "
            "digit, does not end with '.' and is not a path. Choose another with --name"
        )
    return run


def is_run_name(run: str) -> bool:
    return _NAME.fullmatch(run) is not None and ".." not in run and not run.endswith(".")


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


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
