"""`sera gc`: find and delete unreferenced steps and files. No Prefect.

An unreferenced step is deleted in two passes. The first deletes its record but keeps a copy beside it: the
step then no longer exists, and a run that needs it redoes it. The second, at least `older_than` later,
deletes the files. If a run uses the step by then, its record is restored instead. Nothing younger than
`older_than`, by the store's clock, is touched.
"""

import errno
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.store_tools.roots import COLLECTED, Collected, Place, Roots, is_claimed
from sera_core.artifacts.canonical import canonical_json
from sera_core.artifacts.lease import lease_path, look
from sera_core.artifacts.manifest import StepRecord, parse_part, parse_record
from sera_core.artifacts.records import FORMAT, read_record, read_typed
from sera_core.artifacts.run_records import Finished
from sera_core.artifacts.runs import RunStore, list_runs
from sera_core.artifacts.store import Store, create_json
from sera_core.artifacts.upkeep import Stored, Upload, upkeep
from sera_core.errors import BusyError, InputError, StoreError

MIN_AGE_WITH_ACTIVE_RUN = 3600.0
"""Minimum age in seconds of deleted files while a run is active."""
_STEP = re.compile(r"steps/([a-z]+)/([0-9a-f]{64})/(.+)")
_PART = re.compile(r"part-[0-9]{5,}\.json")
_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class Garbage:
    """Something to delete, or a record to restore."""

    path: str
    why: str
    files: list[Stored] = field(default_factory=list)
    place: Place | None = None
    """The step it belongs to."""
    upload: Upload | None = None

    @property
    def bytes(self) -> int:
        """Bytes that deleting it frees."""
        return sum(file.bytes for file in self.files)


UNNEEDED = "unreferenced step: its record now, its files in a later pass"
FILES = "files of a step whose record was deleted in an earlier pass"
NEEDED = "a run uses the step again: its record is restored"


def parse_age(text: str) -> float:
    """Seconds in `90s`, `30m`, `12h`, `7d`, `2w` or `0`.

    Raises:
        InputError: anything else.
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smhdw]?)", text, re.ASCII)
    if found is None or (not found[2] and float(found[1]) != 0):
        raise InputError(f"--older-than {text!r}: give a number with s, m, h, d or w, such as 7d, or 0")
    return float(found[1]) * _SECONDS.get(found[2], 1)


def collect(store: Store, delete: bool, older_than: float) -> dict[str, Any]:
    """Find unreferenced files, and with `delete` delete them. Returns the value of `sera gc --json`.

    Raises:
        StoreError: a run's records cannot be read, so its needs are unknown (nothing is deleted), or the
            store is read-only.
        BusyError: files younger than an hour would be deleted while a run is active.
    """
    if delete and older_than < MIN_AGE_WITH_ACTIVE_RUN:
        _refuse_active_runs(store)
    scan = GarbageScan(store, older_than)
    found = list(scan.garbage())
    restored = _delete_all(store, found) if delete else []
    return {
        "store": store.url,
        "deleted": delete,
        "older_than_seconds": older_than,
        "steps_kept": scan.kept,
        "bytes_kept": scan.bytes - sum(item.bytes for item in found),
        "bytes": sum(item.bytes for item in found),
        "bytes_later": scan.later,
        "items": [
            {"path": item.path, "why": item.why, "files": len(item.files), "bytes": item.bytes}
            for item in found
        ],
        "restored": restored,
    }


def collected_lines(found: dict[str, Any]) -> list[str]:
    """The same as text: one line per reason."""
    by_why: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in found["items"]:
        by_why[item["why"]].append(item)
    verb = "deleted" if found["deleted"] else "unreferenced"
    lines = [f"{found['store']}: {found['steps_kept']} steps in use, {_megabytes(found['bytes_kept'])}."]
    lines += [
        f"  {verb}: {len(items)} × {why} ({_megabytes(sum(item['bytes'] for item in items))})"
        for why, items in sorted(by_why.items())
    ]
    lines += [f"  restored, since a run uses it: {path}" for path in found["restored"]]
    if not found["items"]:
        return [*lines, f"Nothing unreferenced is older than {found['older_than_seconds']:,.0f} s."]
    lines.append(f"{_megabytes(found['bytes'])} now, {_megabytes(found['bytes_later'])} in a later pass.")
    return lines if found["deleted"] else [*lines, "Nothing was deleted; use --delete."]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _refuse_active_runs(store: Store) -> None:
    for run in list_runs(store):
        seen = look(store, lease_path(run))
        if seen is not None and not seen.is_over:
            raise BusyError(
                f"run {run!r} is held by {seen} and may still be writing files younger than an hour; give "
                "--older-than 1h or more, or wait until it ends"
            )


class GarbageScan:
    """One scan of a store: steps in use and unreferenced files."""

    def __init__(self, store: Store, older_than: float) -> None:
        self.store, self.older_than = store, older_than
        self.kept = self.bytes = self.later = 0

    def garbage(self) -> Iterator[Garbage]:
        """Everything to delete or restore."""
        # List files before reading roots: steps committed in between are then not in the list.
        steps, strays = self._steps()
        roots = Roots(self.store)
        for place, files in sorted(steps.items()):
            if place in roots:
                self.kept += 1
                yield from self._leftovers(place, files, roots.records[place])
            else:
                yield from self._unreferenced(place, files)
        yield from strays
        yield from self._stale_notes()
        for upload in upkeep(self.store).uploads():
            if upload.age >= self.older_than:
                yield Garbage(upload.path, "an unfinished upload", upload=upload)

    def _steps(self) -> tuple[dict[Place, list[Stored]], list[Garbage]]:
        """Files by step, and temporary files of killed processes. Other files are left alone."""
        steps: dict[Place, list[Stored]] = defaultdict(list)
        strays = []
        for top in ("steps", "runs", "finished"):
            for file in upkeep(self.store).listing(top):
                self.bytes += file.bytes
                name = file.path.rpartition("/")[2]
                if name.startswith("."):
                    if file.age >= self.older_than:
                        strays.append(Garbage(file.path, "a temporary file of a killed process", [file]))
                elif found := _STEP.fullmatch(file.path):
                    steps[found[1], found[2]].append(file)
        return steps, strays

    def _unreferenced(self, place: Place, files: list[Stored]) -> Iterator[Garbage]:
        """An unreferenced step."""
        if self._is_young(files):
            return
        names = {_relative(file) for file in files}
        path = f"steps/{place[0]}/{place[1]}"
        if COLLECTED in names and "done.json" not in names:
            yield Garbage(path, FILES, _records_first(files), place)
        elif "done.json" in names or any(map(_PART.fullmatch, names)):
            self.later += sum(file.bytes for file in files)
            yield Garbage(path, UNNEEDED, place=place)
        else:
            yield Garbage(path, "unfinished, unreferenced step", files, place)

    def _leftovers(self, place: Place, files: list[Stored], record: StepRecord | None) -> Iterator[Garbage]:
        """Leftover files in the folder of a step in use."""
        path = f"steps/{place[0]}/{place[1]}"
        collected = [file for file in files if _relative(file) == COLLECTED]
        if collected and record is None:
            yield Garbage(path, NEEDED, place=place)
            return
        parts = {name: self._part(path, name) for name in map(_relative, files) if _PART.fullmatch(name)}
        used = parts if record is None else {name: parts[name] for name in record.parts if name in parts}
        wanted = {file for part in used.values() for file in part}
        wanted |= set() if record is None else {f"{f.attempt}/{name}" for name, f in record.files.items()}
        by_top: dict[str, list[Stored]] = defaultdict(list)
        for file in files:
            if _relative(file) not in wanted:
                by_top[_relative(file).partition("/")[0]].append(file)
        for top, left in sorted(by_top.items()):
            why = _left_over(top, record is not None, top in used)
            if why and not self._is_young(left):
                yield Garbage(f"{path}/{top}", why, left, place)

    def _part(self, path: str, name: str) -> set[str]:
        """Files named in a part."""
        data = read_record(self.store, f"{path}/{name}")
        if data is None:  # deleted since it was listed
            return set()
        part = parse_part(data, f"{self.store.url}/{path}/{name}")
        return {f"{file.attempt}/{relative}" for relative, file in part.files.items()}

    def _stale_notes(self) -> Iterator[Garbage]:
        """Notes of finished runs whose run no longer exists."""
        for name in self.store.names("finished"):
            path = f"finished/{name}"
            found = read_typed(self.store, path, Finished)
            age = upkeep(self.store).age(path)
            if found is None or age is None or age < self.older_than:
                continue
            if not RunStore(self.store, found.run).configs():
                yield Garbage(
                    path, f"a note of the run {found.run}, which no longer exists", [Stored(path, 0, age)]
                )

    def _is_young(self, files: Sequence[Stored]) -> bool:
        return min(file.age for file in files) < self.older_than


def _left_over(top: str, done: bool, used: bool) -> str | None:
    """Why an entry in the folder of a step in use is not needed; None if it is needed."""
    if _ATTEMPT.fullmatch(top):
        return "files of an attempt not named in the step's record" if done else "files of a killed attempt"
    if not done or used:
        return None
    if _PART.fullmatch(top):
        return "a checkpoint of a finished step"
    return {"claim": "the claim of a finished step", COLLECTED: "the copy of a restored record"}.get(top)


def _relative(file: Stored) -> str:
    """Path below the step's folder."""
    return file.path.split("/", 3)[3]


def _records_first(files: Sequence[Stored]) -> list[Stored]:
    """Deletion order: parts from the last, so that checkpoints have no gap; the record's copy at the end."""
    parts = sorted((f for f in files if _PART.fullmatch(_relative(f))), key=_relative, reverse=True)
    copy = [file for file in files if _relative(file) == COLLECTED]
    return [*parts, *(file for file in files if file not in parts and file not in copy), *copy]


# ------------------------------------------------------------------------------------------------- delete


def _delete_all(store: Store, found: Sequence[Garbage]) -> list[str]:
    """Delete the items. Returns the steps restored because a run uses them meanwhile."""
    try:
        for item in found:
            delete_item(store, item)
        return _restore_needed(store, [item.place for item in found if item.why == UNNEEDED])
    except OSError as error:
        if error.errno != errno.EROFS and not isinstance(error, PermissionError):
            raise
        raise StoreError(
            f"{store.url}: --delete needs permission to write and delete ({error}); without it gc only reads"
        ) from error


def delete_item(store: Store, item: Garbage) -> None:
    """Delete or restore one item."""
    if item.upload is not None:
        upkeep(store).abort(item.upload)
    elif item.why == NEEDED and item.place is not None:
        restore_record(store, item.place)
    elif item.place is not None and is_claimed(store, item.place):
        return  # a process is doing the step and may resume from these files
    elif item.why == UNNEEDED and item.place is not None:
        delete_record(store, item.place)
    else:
        _delete(store, item.files)


def _delete(store: Store, files: Sequence[Stored]) -> None:
    """Delete records in order, so that an interruption leaves no part without the one before it."""
    records = [file.path for file in files if file.path.endswith(".json")]
    for path in records[:-1]:
        upkeep(store).delete([path])
    upkeep(store).delete([file.path for file in files if not file.path.endswith(".json")])
    upkeep(store).delete(records[-1:])


def delete_record(store: Store, place: Place) -> None:
    """Delete the step's record, keeping a copy."""
    path = f"steps/{place[0]}/{place[1]}"
    record = read_record(store, f"{path}/done.json")
    copy = canonical_json({"format": FORMAT, "record": record})
    upkeep(store).replace(f"{path}/{COLLECTED}", copy)
    upkeep(store).delete([f"{path}/done.json"])


def restore_record(store: Store, place: Place) -> None:
    """Restore the step's record from its copy."""
    path = f"steps/{place[0]}/{place[1]}"
    copy = read_typed(store, f"{path}/{COLLECTED}", Collected)
    if copy is not None and copy.record is not None:
        parse_record(copy.record, f"{store.url}/{path}/{COLLECTED}")
        create_json(store, f"{path}/done.json", copy.record)
    upkeep(store).delete([f"{path}/{COLLECTED}"])


def _restore_needed(store: Store, places: Sequence[Place | None]) -> list[str]:
    """Restore records that a run started meanwhile may have found just before."""
    if not places:
        return []
    roots = Roots(store)
    needed = [place for place in places if place is not None and place in roots]
    for place in needed:
        restore_record(store, place)
    return [f"steps/{step}/{key}" for step, key in needed]
