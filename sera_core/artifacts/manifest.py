"""Steps in the store: what a step computes (StepSpec), what it wrote (StepRecord), a pointer (StepRef)."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, field_validator

from sera_core.artifacts.canonical import files_digest, sha256_json
from sera_core.artifacts.measures import Metrics
from sera_core.artifacts.recorded import copy_recorded, refuse_unrecorded
from sera_core.artifacts.records import StrictModel, read_record, typed
from sera_core.artifacts.store import Store
from sera_core.errors import StoreError

PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pt2", ".pth"})
"""Extensions of pickle formats: opening such a file can run code."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")


class StepRef(StrictModel):
    """A pointer to a finished step: name, key (hash of what it computes) and digest (hash of its files)."""

    step: str
    key: str
    digest: str


class StepSpec(StrictModel):
    """What a step computes. Its key is the hash of everything that changes the result, and nothing else."""

    step: str
    version: int
    fields: dict[str, Any]
    """The configuration that the step function sees; all of it is in the key."""
    inputs: dict[str, StepRef | None]
    """The steps it reads from; None while unknown (in a plan)."""
    where: dict[str, Any] = Field(default_factory=dict)
    """Paths and other values that do not change the result; not in the key."""

    @property
    def key(self) -> str | None:
        """64 hex digits, or None while an input is unknown."""
        if any(ref is None for ref in self.inputs.values()):
            return None
        inputs = {name: ref.digest for name, ref in self.inputs.items() if ref is not None}
        return sha256_json(
            {"step": self.step, "version": self.version, "fields": self.fields, "inputs": inputs}
        )

    @property
    def path(self) -> str:
        """Folder of the step below the store."""
        return f"steps/{self.step}/{self.key}"


class FileRecord(StrictModel):
    """One file of a step."""

    attempt: str = Field(pattern=r"^[0-9a-f]{16}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    rows: int | None = None


class PartRecord(StrictModel):
    """`part-00007.json`: one finished shard, or one checkpoint."""

    format: int
    files: dict[str, FileRecord]
    info: dict[str, Any]


class StepRecord(StrictModel):
    """`done.json`: the files a step wrote, its settings and inputs, its metrics and how long it took."""

    format: int
    step: str
    version: int
    key: str
    fields: dict[str, Any]
    inputs: dict[str, StepRef]
    files: dict[str, FileRecord]
    parts: list[str]
    counts: dict[str, int]
    metrics: Metrics
    environment: dict[str, Any]
    started: str
    seconds: float
    memory: int | None = None
    """Bytes by which memory grew at most; None in records of earlier versions."""

    @field_validator("environment")
    @classmethod
    def _names_its_code(cls, environment: dict[str, Any]) -> dict[str, Any]:
        """Version and digest of the code, if named, are text."""
        names = ("sera-flow", "code")
        wrong = next((name for name in names if not isinstance(environment.get(name, ""), str)), None)
        if wrong is not None:
            raise ValueError(f"environment.{wrong} is not text")
        return environment

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of the sorted (relative path, sha256)."""
        return files_digest({path: file.sha256 for path, file in self.files.items()})

    @property
    def ref(self) -> StepRef:
        """The pointer to this record."""
        return StepRef(step=self.step, key=self.key, digest=self.digest)

    @property
    def spec(self) -> StepSpec:
        """The spec of this record; its key equals the record's unless the record was modified."""
        return StepSpec(step=self.step, version=self.version, fields=self.fields, inputs=dict(self.inputs))

    def metric(self, name: str) -> Any:
        """A metric that every record of this step has.

        Raises:
            StoreError: this record lacks it.
        """
        if name not in self.metrics:
            raise StoreError(
                f"steps/{self.step}/{self.key}/done.json: has no metric {name!r}; restore it from a copy of "
                "the store"
            )
        return self.metrics[name]


def find_record(store: Store, step: str, key: str | None) -> StepRecord | None:
    """The record of a finished step, or None.

    Raises:
        StoreError: the record is invalid, was modified, or was written by a newer sera-flow.
    """
    if key is None:
        return None
    path = f"steps/{step}/{key}/done.json"
    data = read_record(store, path)
    if data is None:
        return None
    record = parse_record(data, f"{store.url}/{path}")
    if (record.step, record.key, record.spec.key) != (step, key, key):
        raise StoreError(
            f"{store.url}/{path}: its settings and inputs do not match its key; restore it from a copy of "
            "the store"
        )
    return record


def parse_record(data: Any, where: str) -> StepRecord:
    """Validate a `done.json`."""
    record = typed(StepRecord, data, where)
    for name in record.files:
        check_file_name(name, where)
    return record


def parse_part(data: Any, where: str) -> PartRecord:
    """Validate a part's record."""
    part = typed(PartRecord, data, where)
    for name in part.files:
        check_file_name(name, where)
    return part


def check_file_name(name: str, where: str = "") -> str:
    """Return the relative path of a step's file if it is safe: plain names between slashes, no pickle.

    Raises:
        StoreError: it leads elsewhere, has non-ASCII letters, or is a pickle.
    """
    said = f"{where}: " if where else ""
    if not _FILE_NAME.fullmatch(name) or ".." in name:
        raise StoreError(
            f"{said}lists the file {name!r}, which is outside its step (plain names separated by slashes); "
            "the record was modified"
        )
    if Path(name).suffix.lower() in PICKLES:
        raise StoreError(
            f"{said}lists the file {name!r}, a format that can run code when it is opened. No step writes or "
            "reads such files; weights are safetensors"
        )
    return name


class Artifact:
    """The files of a finished step, fetched and checked on first use."""

    def __init__(self, store: Store, ref: StepRef) -> None:
        self.store, self.ref = store, ref
        record = find_record(store, ref.step, ref.key)
        if record is None:
            raise StoreError(
                f"{store.url}: step {ref.step} {ref.key[:12]}… has no record; run the experiment again"
            )
        if record.digest != ref.digest:
            raise StoreError(
                f"{store.url}: step {ref.step} {ref.key[:12]}… has digest {record.digest[:12]}…, expected "
                f"{ref.digest[:12]}…; run the experiment again"
            )
        self.record = record

    def path(self, name: str) -> Path:
        """Local path of one file, its hash checked.

        Raises:
            StoreError: the record lists no such file, or the file does not match its hash.
        """
        if name not in self.record.files:
            raise self._names_no(name)
        file = self.record.files[name]
        step = f"steps/{self.ref.step}/{self.ref.key}/{file.attempt}/{name}"
        return self.store.fetch(step, file.sha256, file.bytes, name)

    def uri(self, name: str = "") -> str:
        """URI of a file, or of the step's folder, in the store."""
        attempt = (
            next(iter(self.record.files.values())).attempt if not name else self.record.files[name].attempt
        )
        return f"{self.store.url}/steps/{self.ref.step}/{self.ref.key}/{attempt}" + (
            f"/{name}" if name else ""
        )

    def folder(self, under: str = "") -> Path:
        """A local folder with exactly the step's files below `under` (for `from_pretrained`).

        Raises:
            StoreError: there are none, one does not match its hash, or the folder has an unrecorded file or
                a link.
        """
        names = self._below(under)
        paths = {name: self.path(name) for name in names}
        roots = {_root(path, name) for name, path in paths.items() if path.as_posix().endswith(f"/{name}")}
        if len(roots) == 1 and all(_root(path, name) in roots for name, path in paths.items()):
            folder = roots.pop() / under
            refuse_unrecorded(folder, {str(PurePosixPath(name).relative_to(under)) for name in names})
            return folder
        from sera_core.artifacts.folders import assemble

        return assemble(self.ref.digest, paths) / under

    def copy(self, under: str, target: Path) -> None:
        """Copy exactly the recorded files below `under` into the folder `target`.

        Raises:
            StoreError: there are none, or one does not match its hash.
        """
        for name in self._below(under):
            copied = target / PurePosixPath(name).relative_to(under)
            copy_recorded(self.path(name), copied, self.record.files[name].sha256)

    def _below(self, under: str) -> list[str]:
        names = [name for name in self.record.files if PurePosixPath(under) in PurePosixPath(name).parents]
        if not names:
            raise self._names_no(f"{under}/…")
        return names

    def _names_no(self, name: str) -> StoreError:
        return StoreError(
            f"{self.store.url}/steps/{self.ref.step}/{self.ref.key}/done.json: lists no file {name!r}; "
            "restore it from a copy of the store"
        )


def _root(path: Path, name: str) -> Path:
    """The folder that a file of this relative path lies below."""
    return path.parents[len(PurePosixPath(name).parts) - 1]
