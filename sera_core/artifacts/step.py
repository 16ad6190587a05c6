"""Run a step: return its record if it exists, else run the step function and create the record last."""

import contextlib
import logging
import platform
import re
import secrets
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sera_core import __version__
from sera_core.artifacts.canonical import files_digest, finite, sha256_file
from sera_core.artifacts.local_store import disk_full_error
from sera_core.artifacts.manifest import (
    Artifact,
    FileRecord,
    StepRecord,
    StepSpec,
    check_file_name,
    find_record,
    parse_part,
    parse_record,
)
from sera_core.artifacts.records import FORMAT, read_record, read_series
from sera_core.artifacts.store import Store, create_json, remove_workspace
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.guards.memory import MemoryWatch

LOG = logging.getLogger("sera.step")
READERS = 16
"""Parts that are read at once."""
_PART = re.compile(r"part-([0-9]{5,})\.json")
Progress = Callable[[int, int, str], None]
"""progress(done, total, unit): called now and then while a step runs."""
MEMORY_SETTINGS = {
    "logps": "execution.tokens_per_batch",
    "sample": "execution.sampling_batch",
    "train": "execution.micro_batch",
    "sft": "execution.micro_batch",
}
"""The setting that a step's memory depends on."""


def no_progress(done: int, total: int, unit: str) -> None:
    """Report no progress."""


class Attempt:
    """One attempt at a step: its configuration, inputs and parts, and its own folder to write into."""

    def __init__(
        self,
        store: Store,
        spec: StepSpec,
        execution: ExecutionConfig,
        progress: Progress = no_progress,
        shared: tuple[str, Path] | None = None,
    ) -> None:
        """`shared`: id and folder of an attempt that another process began; None: a new one."""
        self.store, self.spec, self.execution, self.progress = store, spec, execution, progress
        self.id = secrets.token_hex(8) if shared is None else shared[0]
        self.folder = store.workspace(f"{spec.path}/{self.id}") if shared is None else shared[1]
        self.environment: dict[str, Any] = {}
        """What the record's environment says beside the software and hardware."""
        self.counts: Counter[str] = Counter()
        self.metrics: dict[str, Any] = {}
        self.part_metrics: list[dict[str, Any]] = []
        self.memory = MemoryWatch(self._warn_of_memory)
        self._used: list[str] = []
        self._parts: dict[int, dict[str, Any]] = {}
        self._dropped: set[int] = set()
        self._committed: dict[str, FileRecord] = {}

    @property
    def fields(self) -> dict[str, Any]:
        """The configuration in the step's key; the step function sees no other."""
        return self.spec.fields

    def input(self, name: str) -> Artifact:
        """An input step's files."""
        ref = self.spec.inputs[name]
        if ref is None:
            raise SeraError(f"step {self.spec.step}: its input {name!r} has not been computed yet")
        return Artifact(self.store, ref)

    def write(self, relative: str) -> Path:
        """Path of a file to write in this attempt."""
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def parts(self) -> list[dict[str, Any]]:
        """Finished parts of this step, by any attempt, in order, up to the first gap.

        Checkpoints and answers are numbered without gaps; for shards see `shards`.
        """
        found = []
        for number, record in read_series(self.store, self.spec.path + "/part-{:05d}.json"):
            parse_part(record, f"{self.store.url}/{self.spec.path}/{_part_name(number)}")
            found.append(self._parts.setdefault(number, record))
        return found

    def shards(self, total: int) -> dict[int, dict[str, Any]]:
        """Finished parts of a step of `total` shards by number, in order; workers may have left gaps.

        They are found by a listing. A part that it misses is done again, and then the stored record wins.
        """
        known = sum(number in self._parts for number in range(total))
        listed = part_numbers(self.store, self.spec.path) if known < total else []
        unread = [number for number in listed if number < total and number not in self._parts]
        with ThreadPoolExecutor(READERS) as readers:  # one by one they take hours in an object store
            for number, record in zip(unread, readers.map(self._part, unread), strict=True):
                if record is not None:
                    self._parts[number] = record
        return {number: self._parts[number] for number in range(total) if number in self._parts}

    def _part(self, number: int) -> dict[str, Any] | None:
        path = f"{self.spec.path}/{_part_name(number)}"
        record = read_record(self.store, path)
        if record is not None:
            parse_part(record, f"{self.store.url}/{path}")
        return record

    def part_path(self, part: dict[str, Any], relative: str) -> Path:
        """Local path of one file of a part, its hash checked unless this attempt wrote it."""
        file = FileRecord.model_validate(part["files"][relative])
        if file.attempt == self.id:
            return self.folder / relative
        path = f"{self.spec.path}/{file.attempt}/{relative}"
        return self.store.fetch(path, file.sha256, file.bytes, relative)

    def part_paths(self, parts: Iterable[dict[str, Any]]) -> Iterator[Path]:
        """Local path of the one file of each part, in order; the next ones are fetched meanwhile."""
        ahead: deque[Future[Path]] = deque()
        with ThreadPoolExecutor(READERS) as readers:
            for part in parts:
                ahead.append(readers.submit(self.part_path, part, next(iter(part["files"]))))
                if len(ahead) == READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def commit_part(self, number: int, files: list[str], info: dict[str, Any]) -> dict[str, Any]:
        """Create part-<number>.json for files of this attempt; returns the stored record.

        If another attempt created it first, its record is returned.
        """
        records = {relative: self._commit(relative).model_dump() for relative in files}
        record, _ = create_json(
            self.store,
            f"{self.spec.path}/{_part_name(number)}",
            {"format": FORMAT, "files": records, "info": info},
        )
        return self._parts.setdefault(number, record)

    def drop_part(self, number: int) -> None:
        """Delete the files of a part (a checkpoint) that is no longer needed.

        The part's record stays, because readers of checkpoints stop at a gap. After a kill, gc
        removes leftover files once the step is done. If the store does not allow deletion, the files stay,
        with a warning.
        """
        if number in self._dropped:
            return
        self._dropped.add(number)
        try:
            for relative, file in self._parts[number]["files"].items():
                self.store.remove(f"{self.spec.path}/{file['attempt']}/{relative}")
                (self.folder / relative).unlink(missing_ok=True)
        except OSError as error:
            part = f"{self.spec.path}/{_part_name(number)}"
            LOG.warning("%s: cannot delete its files, so they stay (%s)", part, error)

    def drop_unused_parts(self, record: StepRecord) -> None:
        """After `done.json` is written: delete the files of parts that it does not list (checkpoints)."""
        for number in sorted(self._parts):
            if _part_name(number) not in record.parts:
                self.drop_part(number)

    @property
    def committed(self) -> bool:
        """Whether a part of this attempt is already in the store."""
        return bool(self._committed)

    def use_parts(self, parts: list[dict[str, Any]]) -> None:
        """Set the parts that the result is made from."""
        self._used = [_part_name(number) for number in range(len(parts))]

    def _warn_of_memory(self, grown: int, planned: int) -> None:
        setting = MEMORY_SETTINGS.get(self.spec.step)
        LOG.warning(
            "step %s: holds %.1f GiB more memory than at its start, %.1f GiB were planned%s",
            self.spec.step,
            grown / 2**30,
            planned / 2**30,
            f"; if memory runs out, lower {setting}" if setting else "",
        )

    def _commit(self, relative: str) -> FileRecord:
        if relative not in self._committed:
            check_file_name(relative)
            path = self.folder / relative
            rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
            place = f"{self.spec.path}/{self.id}"
            blob = self.store.commit_file(self.folder, place, relative, self.progress)
            self._committed[relative] = FileRecord(
                attempt=self.id, sha256=blob.sha256, bytes=blob.bytes, rows=rows
            )
        return self._committed[relative]

    def commit(self, files: list[str], started: datetime, seconds: float) -> StepRecord:
        """Create done.json, last. If two attempts race, both continue with the record of the first."""
        key = self.spec.key
        assert key is not None
        record = StepRecord(
            format=FORMAT,
            step=self.spec.step,
            version=self.spec.version,
            key=key,
            fields=self.fields,
            inputs={name: ref for name, ref in self.spec.inputs.items() if ref is not None},
            files={relative: self._commit(relative) for relative in sorted(files)},
            parts=self._used,
            counts=dict(sorted(self.counts.items())),
            metrics=finite(self.metrics),
            environment={**environment(), **self.environment},
            started=started.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            memory=self.memory.grown,
        )
        data = record.model_dump(mode="json")
        path = f"{self.spec.path}/done.json"
        winner, ours = create_json(self.store, path, data)
        if ours:
            for relative, file in record.files.items():
                self.store.keep(self.folder / relative, file.sha256, relative)
        return parse_record(winner, f"{self.store.url}/{path}")


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"


def part_numbers(store: Store, path: str) -> list[int]:
    """Numbers of a step's finished parts, in order, possibly with gaps.

    Args:
        store: the store.
        path: the step's folder in it.
    """
    return sorted(int(found[1]) for name in store.names(path) if (found := _PART.fullmatch(name)))


Work = Callable[[Attempt], list[str]]
"""A step function: writes files into the attempt and returns their relative paths."""


def run_step(
    store: Store, spec: StepSpec, work: Work, execution: ExecutionConfig, progress: Progress = no_progress
) -> StepRecord:
    """The record of a step: from the store, or computed now (DESIGN, laws 1 to 3)."""
    return find_record(store, spec.step, spec.key) or make_step(store, spec, work, execution, progress)


def make_step(
    store: Store, spec: StepSpec, work: Work, execution: ExecutionConfig, progress: Progress = no_progress
) -> StepRecord:
    """Compute a step that has no record yet; returns its record, or that of a faster process."""
    started, clock = datetime.now(UTC), time.monotonic()
    attempt = Attempt(store, spec, execution, progress)
    try:
        with attempt.memory:
            files = work(attempt)
        record = attempt.commit(files, started, time.monotonic() - clock)
        attempt.drop_unused_parts(record)
        return record
    except SeraError:
        if not attempt.committed:  # failed before any commit: remove the partial files
            shutil.rmtree(attempt.folder, ignore_errors=True)
        raise
    except Exception as error:
        if (trouble := disk_full_error(error, attempt.folder)) is None:
            raise
        if not attempt.committed:
            shutil.rmtree(attempt.folder, ignore_errors=True)
        raise trouble from error
    finally:
        remove_workspace(store, attempt.folder)


@cache
def code_digest() -> str:
    """Digest of the running code, including local changes."""
    home = Path(__file__).parents[2]
    files = [file for room in ("flows", "tasks", "sera_core") for file in (home / room).rglob("*.py")]
    return files_digest({file.relative_to(home).as_posix(): sha256_file(file) for file in files})


@cache
def environment() -> dict[str, Any]:
    """The software and hardware of a step; recorded, but never in a key."""
    names = ("torch", "transformers", "trl", "peft", "vllm", "prefect", "pyarrow", "numpy", "openai")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "sera-flow": __version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "packages": versions,
    }
