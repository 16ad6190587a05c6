"""Lineage of a policy: every step back to the data and the start policy, in one record. No Prefect.

Each step names its inputs by key and digest, and its key is the hash of its settings and those digests. The
only steps without inputs are the data and the start policy, identified by the digests of their sources.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sera_core.artifacts.manifest import Artifact, StepRecord, StepRef
from sera_core.artifacts.records import FORMAT, StrictModel
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.errors import InputError
from sera_core.steps import SIDES

COMMIT_DIGITS = 40


class Source(StrictModel):
    """A data or model source."""

    name: str
    """Its name without folders."""
    digest: str
    """sha256 of a file, commit of a hub id, or digest of a model folder's files."""

    @property
    def is_on_hub(self) -> bool:
        """Whether this is a hub id (its digest is a commit)."""
        return len(self.digest) == COMMIT_DIGITS


class DataSource(Source):
    """A source of preference pairs or prompts."""

    side: str
    split: str
    weight: float


class Code(StrictModel):
    """A version of the code that ran steps of the chain."""

    version: str
    digest: str | None
    """Digest of the source files."""


class LineageStep(StrictModel):
    """One step of the chain."""

    step: str
    version: int
    key: str
    digest: str
    fields: dict[str, Any]
    inputs: dict[str, StepRef]
    files: dict[str, str]
    """sha256 of each file."""
    environment: dict[str, Any]
    started: str
    seconds: float


class LineageRound(StrictModel):
    """The policies and data of one round."""

    round: int
    decision: str
    reason: str
    manifest_sha256: str | None
    parent_sha256: str | None
    policy: StepRef | None
    started_from: StepRef | None
    trained_on: StepRef | None
    sampled_by: StepRef | None
    human_pairs_scored_by: list[StepRef]
    generated_pairs_scored_by: list[StepRef]
    references: list[StepRef]


class PolicyRecord(StrictModel):
    """The policy."""

    run: str
    round: int
    step: StepRef
    sha256: str
    """Digest of the policy's folder in the store."""
    weights: str
    """Digest of its weights."""


class Lineage(StrictModel):
    """`lineage.json`."""

    format: int
    policy: PolicyRecord
    config_sha256: str
    config: dict[str, Any]
    """Settings that change results, with digests for sources."""
    seed: int
    start: Source
    fine_tuned_on: Source | None = None
    """What the model was fine-tuned on before round 0; None without."""
    data: list[DataSource]
    code: list[Code]
    rounds: list[LineageRound]
    steps: list[LineageStep]
    """Inputs come before the steps that use them."""


def lineage(records: RunStore, manifest: RoundManifest) -> Lineage:
    """The lineage of a round's policy.

    Raises:
        InputError: the round trained no policy.
        StoreError: a step of the chain is missing or has another digest.
    """
    if "policy" not in manifest.steps:
        raise InputError(
            f"round {manifest.round} trained no policy ({manifest.stop_reason}); choose another with --round"
        )
    walk = _Chain(records)
    rounds = [walk.round(r) for r in records.rounds()[: manifest.round + 1]]
    policy = walk.step(manifest.steps["policy"])
    made = walk.reached_from(policy)
    config = records.configs()[0]
    return Lineage(
        format=FORMAT,
        policy=PolicyRecord(
            run=records.run,
            round=manifest.round,
            step=policy.ref,
            sha256=manifest.artifacts["policy"]["sha256"],
            weights=policy.metric("weights/result"),
        ),
        config_sha256=config.config_sha256,
        config=config.resolved,
        seed=config.resolved["seed"],
        start=start_of(records),
        fine_tuned_on=fine_tuned_on(records),
        data=data_of(records),
        code=_codes(made),
        rounds=rounds,
        steps=[_step(record) for record in made],
    )


def start_of(records: RunStore) -> Source:
    """The start policy."""
    config = records.configs()[0]
    digest = config.resolved["digests"]["model"]
    name = display_name(config.settings.model.source, digest)
    return Source(name=name, digest=digest)


def fine_tuned_on(records: RunStore) -> Source | None:
    """What the model was fine-tuned on before round 0: conversations, or the step with the chosen answers."""
    config = records.configs()[0]
    start = config.settings.start
    if not start.tunes:
        return None
    if start.file is not None:
        digest = config.resolved["digests"]["sft"]
        return Source(name=display_name(start.file, digest), digest=digest)
    record = Artifact(records.store, records.rounds()[0].steps["model"]).record
    return Source(name=start.sft, digest=record.inputs["examples"].digest)


def data_of(records: RunStore) -> list[DataSource]:
    """The sources of pairs and prompts."""
    config = records.configs()[0]
    data = config.settings.data
    found = []
    for side in SIDES:
        digests = config.resolved["digests"]["data"][side]
        for source, digest in zip(getattr(data, side), digests, strict=True):
            name = display_name(source.path, digest)
            found.append(
                DataSource(name=name, digest=digest, side=side, split=source.split, weight=source.weight)
            )
    return found


def display_name(source: str, digest: str) -> str:
    """Name of a source without folders, hosts and signatures."""
    if len(digest) == COMMIT_DIGITS or source.startswith(("bundled:", "package:")):
        return source
    where = urlsplit(source).path if "://" in source else source
    return PurePosixPath(where).name or "source"


class _Chain:
    """The records of the chain, each read once and checked against its digest."""

    def __init__(self, records: RunStore) -> None:
        self.records = records
        self._seen: dict[str, StepRecord] = {}

    def step(self, ref: StepRef) -> StepRecord:
        if ref.key not in self._seen:
            self._seen[ref.key] = Artifact(self.records.store, ref).record
        return self._seen[ref.key]

    def reached_from(self, record: StepRecord) -> list[StepRecord]:
        """The step and all its ancestors, each once, inputs first."""
        found: dict[str, StepRecord] = {}
        waiting = [(record, False)]
        while waiting:
            record, inputs_done = waiting.pop()
            if record.key in found:
                continue
            if inputs_done:
                found[record.key] = record
                continue
            waiting.append((record, True))
            waiting += [(self.step(ref), False) for _, ref in sorted(record.inputs.items(), reverse=True)]
        return list(found.values())

    def round(self, manifest: RoundManifest) -> LineageRound:
        steps = manifest.steps
        trained = self.step(steps["policy"]).inputs if "policy" in steps else {}
        sampled = self.step(steps["samples"]).inputs.get("policy") if "samples" in steps else None
        human = self.step(steps["scored"])
        return LineageRound(
            round=manifest.round,
            decision=manifest.decision,
            reason=manifest.reason,
            manifest_sha256=self.records.sha256_of_round(manifest.round),
            parent_sha256=manifest.parent_sha256,
            policy=steps.get("policy"),
            started_from=trained.get("start"),
            trained_on=steps.get("mixture"),
            sampled_by=sampled,
            human_pairs_scored_by=self._judges(human, "policy"),
            generated_pairs_scored_by=self._generated_judges(steps.get("responses"), sampled),
            references=self._judges(human, "reference"),
        )

    def _generated_judges(self, ref: StepRef | None, sampled: StepRef | None) -> list[StepRef]:
        """Newest first. Without a head among the judges, the sampler's log-probabilities were used."""
        if ref is None:
            return []
        scored = self.step(ref)
        judges = self._judges(scored, "policy")
        by_sampler = sampled is not None and len(judges) < len(scored.fields["weights"])
        return [sampled, *judges] if sampled is not None and by_sampler else judges

    def _judges(self, scored: StepRecord, kind: str) -> list[StepRef]:
        """Policies whose log-probabilities gave a step's rewards."""
        names = sorted(name for name in scored.inputs if name.startswith(f"{kind}-"))
        return [self.step(scored.inputs[name]).inputs["policy"] for name in names]


def _step(record: StepRecord) -> LineageStep:
    names = ("step", "version", "key", "digest", "fields", "inputs", "environment", "started", "seconds")
    files = {path: file.sha256 for path, file in record.files.items()}
    return LineageStep(files=files, **{name: getattr(record, name) for name in names})


def _codes(made: list[StepRecord]) -> list[Code]:
    """The code versions that ran the steps, in step order."""
    found: dict[tuple[Any, Any], Code] = {}
    for record in made:
        environment: Mapping[str, Any] = record.environment
        pair = (environment.get("sera-flow", "unknown"), environment.get("code"))
        found.setdefault(pair, Code(version=pair[0], digest=pair[1]))
    return list(found.values())
