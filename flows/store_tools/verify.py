"""Verify a run: every link between its records, and the hash of every file.

run-000.json -> round manifests (each with its parent's sha256) -> the steps they name -> their inputs -> the
data and the model, whose digests are in run-000.json. Files are read from the store, not from a cache.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

from flows.running.manifests import artifact, manifest_fields
from sera_core.artifacts.canonical import canonical_json, files_digest
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import Artifact, StepRecord, StepRef, find_record, parse_part
from sera_core.artifacts.records import read_record, read_series
from sera_core.artifacts.run_records import BEST, CANDIDATES, HEAD, SFT, RoundManifest, RunRecord, changes
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.upkeep import upkeep
from sera_core.errors import StoreError
from sera_core.judges.verdicts import JUDGE_STEP, recorded
from sera_core.steps import FOLD, SIDES

ReportProgress = Callable[[int, int, str], None]
PARALLEL_READS = 4
"""Files read in parallel."""


@dataclass(frozen=True)
class Verified:
    """Counts of what was verified."""

    rounds: int
    steps: int
    links: int
    files: int
    bytes: int


def verify(records: RunStore, progress: ReportProgress = lambda done, total, unit: None) -> Verified:
    """Follow every link of a run, then hash every file of its steps.

    Symbolic links in a local store, and unrecorded files in the folder of a finished step, are errors.

    Raises:
        StoreError: the first problem, with its path.
    """
    chain = Chain(records)
    chain.follow()
    upkeep(records.store).refuse_links()
    chain.refuse_unrecorded()
    files = [(record, name) for record in chain.steps.values() for name in record.files]
    size = sum(record.files[name].bytes for record, name in files)
    done = 0
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        try:
            for read in pool.map(chain.check_file, *zip(*files, strict=True)) if files else ():
                done += read
                progress(done, size, "bytes")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    chain.check_measured()
    return Verified(chain.rounds, len(chain.steps), chain.links, len(files), done)


class Chain:
    """The links of a run, each followed once."""

    def __init__(self, records: RunStore) -> None:
        self.records, self.store = records, records.store
        self.steps: dict[str, StepRecord] = {}
        self.links = self.rounds = 0

    def follow(self) -> None:
        """Check all links from the configuration to the data and the model."""
        configs = self.records.configs()
        for number, config in enumerate(configs):
            self._check_config(number, config, configs[0])
        rounds = self.records.rounds()  # which checks each parent's sha256
        for number, manifest in enumerate(rounds):
            self._check_manifest(manifest, configs[0])
            for ref in [*manifest.used, *manifest.steps.values()]:
                self._step(ref, self._round_path(number))
            self._check_sources(manifest, configs[0])
            self._check_policies(manifest, History(rounds[:number]))
            self._check_answer(manifest)
            self._check_artifacts(manifest)
            self._check_fields(manifest, {ref.key for before in rounds[:number] for ref in before.used})
            self._check_final(manifest)
        self.rounds = len(rounds)
        self._follow_verdicts()

    def _follow_verdicts(self) -> None:
        """Check a judge's verdicts about answers of this run."""
        for record in recorded(self.store, JUDGE_STEP):
            if all(ref.key in self.steps for ref in record.inputs.values()):
                self._step(record.ref, _folder(record))

    def refuse_unrecorded(self) -> None:
        """Refuse files in step folders that no record names."""
        found = [path for record in self.steps.values() for path in self._unrecorded(record)]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            self._fail(
                found[0],
                f"no record names this file{more}, so no step of the run wrote or used it; remove it",
            )

    def _unrecorded(self, record: StepRecord) -> list[str]:
        """Unrecorded files in the folder of the finished attempt; other attempts are left to gc."""
        recorded = {f"{file.attempt}/{name}" for name, file in record.files.items()}
        attempts = sorted({file.attempt for file in record.files.values()})
        beside = [
            path
            for attempt in attempts
            for name in upkeep(self.store).files_below(f"{_folder(record)}/{attempt}")
            if (path := f"{attempt}/{name}") not in recorded
        ]
        if beside:  # rare, so parts are read only then
            recorded |= self._in_parts(record)
        return [f"{_folder(record)}/{path}" for path in beside if path not in recorded]

    def _in_parts(self, record: StepRecord) -> set[str]:
        """Files named in the step's finished shards or checkpoints."""
        found = set()
        for number, data in read_series(self.store, _folder(record) + "/part-{:05d}.json"):
            part = parse_part(data, f"{self.store.url}/{_folder(record)}/part-{number:05d}.json")
            found |= {f"{file.attempt}/{name}" for name, file in part.files.items()}
        return found

    def check_file(self, record: StepRecord, name: str) -> int:
        """Hash one file in the store. Returns its size."""
        file = record.files[name]
        path = f"{_folder(record)}/{file.attempt}/{name}"
        found = upkeep(self.store).hashed(path)
        if found is None:
            self._fail(path, "missing; restore it from a copy of the store")
        if found != (file.sha256, file.bytes):
            recorded = f"{file.bytes:,} bytes, sha256 {file.sha256[:12]}…"
            self._fail(
                path,
                f"{found[1]:,} bytes, sha256 {found[0][:12]}… but its record says {recorded}; it was changed",
            )
        return file.bytes

    # ------------------------------------------------------------------------------------------- records

    def _check_config(self, number: int, config: RunRecord, first: RunRecord) -> None:
        path = f"{self.records.path}/run-{number:03d}.json"
        self._check(config.run == self.records.run, path, f"is the record of the run {config.run!r}")
        self._check(config.changed is None, path, f"{config.changed} does not match its config_sha256")
        self._check(
            config.config_sha256 == first.config_sha256, path, "has another configuration than run-000.json"
        )

    def _check_manifest(self, manifest: RoundManifest, config: RunRecord) -> None:
        path = self._round_path(manifest.round)
        self._check(manifest.run == self.records.run, path, f"is a round of the run {manifest.run!r}")
        self._check(manifest.config_sha256 == config.config_sha256, path, "has another configuration")

    def _check_sources(self, manifest: RoundManifest, config: RunRecord) -> None:
        """Data and model are those of the configuration."""
        digests, path = config.resolved["digests"], self._round_path(manifest.round)
        data = self.steps[manifest.steps["data"].key].fields
        for side in SIDES:
            found = [source["digest"] for source in data[side]]
            self._check(found == digests["data"][side], path, f"uses other {side} data")
        model = self._model(manifest, digests, path)
        self._check(model.fields["source_digest"] == digests["model"], path, "uses another start policy")
        if (rated := manifest.steps.get("ratings")) is not None:
            rater = self.steps[rated.key].fields["rater"]
            self._check(rater == digests.get("rater"), path, "uses another rater")
        for role in ("capabilities", "start_capabilities"):
            if role in manifest.steps:
                tasks = self.steps[manifest.steps[role].key].fields["tasks"]
                self._check(tasks == digests.get("harness"), path, "uses other capability tasks")
        if (verdicts := manifest.steps.get("verdicts")) is not None:
            judge = self.steps[verdicts.key].fields["judge"]
            self._check(judge == digests.get("judge"), path, "uses another judge")

    def _model(self, manifest: RoundManifest, digests: Mapping[str, Any], path: str) -> StepRecord:
        """The step that imported the model; if it was fine-tuned, on what the configuration names."""
        record = self.steps[manifest.steps["model"].key]
        if record.step != SFT:
            return record
        examples = self.steps[record.inputs["examples"].key]
        if "messages" in examples.inputs:
            given = self.steps[examples.inputs["messages"].key].fields["digest"]
            self._check(given == digests.get("sft"), path, "was fine-tuned on other conversations")
        else:
            own = examples.inputs["pairs"].digest == manifest.steps["pairs"].digest
            self._check(own and "sft" not in digests, path, "was fine-tuned on other pairs")
        return self.steps[record.inputs["model"].key]

    def _check_policies(self, manifest: RoundManifest, before: History) -> None:
        """Start and sampling policy are the head of that time, or the start policy."""
        path = self._round_path(manifest.round)
        own = {manifest.steps["model"].digest}
        own |= {head.steps["policy"].digest for head in before.lineage}
        for role, source in (("policy", "start"), ("samples", "policy")):
            if role in manifest.steps and manifest.steps[role].step != CANDIDATES:
                ref = self.steps[manifest.steps[role].key].inputs[source]
                self._check(ref.digest in own, path, f"{role}: not from a policy in this run's lineage")
        sampled = manifest.steps.get("samples")
        anchors = None if sampled is None else self.steps[sampled.key].inputs.get("anchors")
        if anchors is not None:
            given = self.steps[anchors.key].inputs["policy"].digest
            self._check(given == manifest.steps["model"].digest, path, "samples: anchors of another policy")
        if "head_mixture" in (reviewed := self.steps[manifest.steps["scored"].key].inputs):
            self._check_folds(reviewed, before, path)

    def _check_folds(self, reviewed: Mapping[str, StepRef], before: History, path: str) -> None:
        """Cross-fitted scores are from a policy of their fold, trained on the mixture of a head."""
        heads = {head.steps["mixture"].digest for head in before.lineage}
        for name in (name for name in reviewed if FOLD in name):
            scores = self.steps[reviewed[name].key]
            policy = self.steps[scores.inputs["policy"].key]
            fits = policy.fields.get("fold") == scores.fields.get("fold") is not None
            fits = fits and policy.inputs["mixture"].digest in heads
            self._check(fits, path, f"{name}: not scored by a policy of its fold")

    def _check_answer(self, manifest: RoundManifest) -> None:
        """A reviewed decision matches the recorded answer."""
        if "decision" not in manifest.steps:
            return
        used = self.steps[manifest.steps["decision"].key].fields["answer"]
        if used is not None:
            given = self.records.given_answer(manifest.round) or {}
            path = f"{self.records.path}/review-{manifest.round:03d}-answer.json"
            self._check(
                {name: given.get(name) for name in used} == used,
                path,
                "differs from the answer in the decision",
            )

    def _check_artifacts(self, manifest: RoundManifest) -> None:
        for role, place in manifest.artifacts.items():
            record = self.steps.get(place["key"])
            self._check(
                record is not None and _artifact(record, place["path"]) == place,
                self._round_path(manifest.round),
                f"the artifact {role} differs from its step's record (steps/{place['step']}/{place['key']})",
            )

    def _check_fields(self, manifest: RoundManifest, earlier: Collection[str]) -> None:
        """The manifest matches its steps' records, and `used` names all steps it depends on.

        Args:
            manifest: the round's manifest.
            earlier: keys of the steps used in earlier rounds.
        """
        path = self._round_path(manifest.round)
        records = {role: self.steps[ref.key] for role, ref in manifest.steps.items()}
        new = [self.steps[ref.key] for ref in manifest.used if ref.key not in earlier]
        for name, expected in manifest_fields(records, new).items():
            found = getattr(manifest, name)
            other = canonical_json(found) != canonical_json(expected)
            what = (
                next(iter(changed for changed, *_ in changes({name: expected}, {name: found})), name)
                if other
                else ""
            )
            self._check(not other, path, f"{what} differs from the records of the round's steps")
        used = {ref.key for ref in manifest.used} | set(earlier)
        for record in self._reached(list(records.values())):
            self._check(record.key in used, path, f"depends on {_folder(record)}, which `used` does not name")

    def _reached(self, records: list[StepRecord]) -> Iterator[StepRecord]:
        """The steps and all their ancestors."""
        seen = set()
        while records:
            record = records.pop()
            if record.key not in seen:
                seen.add(record.key)
                yield record
                records += [self.steps[ref.key] for ref in record.inputs.values()]

    def _check_final(self, manifest: RoundManifest) -> None:
        """The test evidence is from the round's own policy."""
        final = self.records.test_evidence(manifest.round)
        if final is None:
            return
        path = f"{self.records.path}/final-{manifest.round:03d}.json"
        self._step(StepRef.model_validate(final["step"]), path)
        record = self.steps[final["step"]["key"]]
        self._check(record.step == "test", path, f"its step is {record.step!r}, not `test`")
        judged = self.steps[record.inputs["policy_test"].key].inputs["policy"]
        self._check(judged == manifest.steps.get("policy"), path, "is not from the policy of its round")
        same = canonical_json(final["metrics"]) == canonical_json(record.metrics)
        self._check(same, path, "its metrics differ from its step's record")

    def check_measured(self) -> None:
        """The recorded metrics of evidence, decisions and weights match the files of their steps."""
        for record in self.steps.values():
            held = _measured(Artifact(self.store, record.ref))
            told = {name: record.metrics.get(name) for name in held}
            other = next(iter(changes(held, {name: _plain(value) for name, value in told.items()})), None)
            where = f"{_folder(record)}/done.json"
            self._check(other is None, where, f"its metric {other and other[0]} differs from its files")

    # --------------------------------------------------------------------------------------------- steps

    def _step(self, ref: StepRef, named_by: str) -> None:
        """Check a step and all its ancestors."""
        waiting = [(ref, named_by)]
        while waiting:
            ref, named_by = waiting.pop()
            self.links += 1
            record = self.steps.get(ref.key) or self._read(ref, named_by)
            self._check(
                record.step == ref.step, named_by, f"names {ref.key[:12]}… as a step {ref.step!r:.60}"
            )
            self._check(
                record.digest == ref.digest,
                f"{_folder(record)}/done.json",
                f"has other content (digest {record.digest[:12]}…) than {named_by} names "
                f"({ref.digest[:12]}…)",
            )
            if ref.key not in self.steps:
                self.steps[ref.key] = record
                waiting += [(source, f"{_folder(record)}/done.json") for source in record.inputs.values()]

    def _read(self, ref: StepRef, named_by: str) -> StepRecord:
        path = f"steps/{ref.step}/{ref.key}"
        record = find_record(self.store, ref.step, ref.key)
        if record is None:
            self._fail(f"{path}/done.json", f"missing, but {named_by} names it; run the experiment again")
        for name in record.parts:
            data = read_record(self.store, f"{path}/{name}")
            self._check(data is not None, f"{path}/{name}", "missing, but the step was made from it")
            parse_part(data, f"{self.store.url}/{path}/{name}")
        return record

    def _round_path(self, number: int) -> str:
        return f"{self.records.path}/round-{number:03d}.json"

    def _check(self, holds: bool, path: str, what: str) -> None:
        if not holds:
            self._fail(path, f"{what}; restore it from a copy of the store")

    def _fail(self, path: str, what: str) -> NoReturn:
        raise StoreError(f"{self.store.url}/{path}: {what}")


def _folder(record: StepRecord) -> str:
    return f"steps/{record.step}/{record.key}"


def _artifact(record: StepRecord, path: str) -> dict[str, Any] | None:
    """The artifact according to the step's record; None if it names no such file."""
    return artifact(record, path) if path.endswith("/") or path in record.files else None


def _measured(artifact: Artifact) -> dict[str, Any]:
    """Metrics of a step that its hashed files contain too."""
    step, files = artifact.ref.step, artifact.record.files
    if step in ("evaluate", "test"):
        return json.loads(artifact.path("evidence.json").read_text())
    if step == "decide":
        return _decided(json.loads(artifact.path("decision.json").read_text()))
    if step in ("train", SFT):
        weights = {name.removeprefix("policy/"): f.sha256 for name, f in files.items() if _is_weights(name)}
        return {"weights/result": files_digest(weights)}
    return {}


def _decided(told: dict[str, Any]) -> dict[str, Any]:
    alarm, verdict = told["alarm"] or {}, told["verdict"]
    decided = {
        **{name: told[name] for name in ("decision", "reason", "stop_reason")},
        **{name: told["signals"][name] for name in ("overlap", "ks", "sign_changes")},
        "verdict": verdict["name"],
        "alarm": alarm.get("state", alarm.get("reason")),
    }
    if "quantity" not in told:  # written by an older version
        return decided
    best = told["best"] or {}
    return {
        **decided,
        "verdict_reason": verdict["reason"],
        "alarm_reason": alarm.get("sentence"),
        "score_metric": told["quantity"],
        BEST: best.get("round"),
        "best_reason": best.get("sentence"),
        HEAD: told["head"],
    }


def _is_weights(name: str) -> bool:
    return name.startswith("policy/") and ".safetensors" in name


def _plain(value: Any) -> Any:
    """A metric as evidence.json has it, in which an infinite number is null."""
    return None if value in ("inf", "-inf") else value
