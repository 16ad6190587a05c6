"""Test whether a store works: write, read, ranged read, file transfer, and eight writers racing for a record.

Not every "S3-compatible" server supports conditional puts, where only one of several writers succeeds, and
the store depends on them. A bucket is tested once before its first use; a record in it says that it passed.
"""

import secrets
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from sera_core.artifacts.checks import Blob
from sera_core.artifacts.folders import cache_folder
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.store import LocalStore, Store, create_json
from sera_core.errors import StoreError

RACERS, RACES = 8, 5
PASSED = "probe/passed.json"


@dataclass(frozen=True)
class Finding:
    """Result of one test: `write`, `read`, `range`, `file` or `race`."""

    name: str
    ok: bool
    detail: str


def probe(store: Store, folder: str | None = None) -> list[Finding]:
    """Test a store in a folder of it, which is emptied afterwards; stops at the first failure."""
    folder = folder or f"probe/{secrets.token_hex(8)}"
    trial = _Trial(store, folder)
    found: list[Finding] = []
    try:
        for name, act in trial.acts.items():
            found.append(_tried(name, act))
            if not found[-1].ok:
                break
    finally:
        trial.clean()
    return found


def check_shared(store: Store, accept_racy: bool) -> str | None:
    """Test a bucket before its first use; returns a warning, or None.

    Args:
        store: the store; a local folder needs no test, and a bucket is tested only once.
        accept_racy: `execution.accept_racy_store`.

    Raises:
        StoreError: a test failed, or several racing writers won and `accept_racy` is false.
    """
    if isinstance(store, LocalStore) or store.read_bytes(PASSED) is not None:
        return None
    failed = [finding for finding in probe(store) if not finding.ok]
    if not failed:
        tried = datetime.now(UTC).isoformat(timespec="seconds")
        create_json(store, PASSED, {"format": FORMAT, "racers": RACERS, "races": RACES, "tried": tried})
        return None
    first = failed[0]
    if first.name != "race":
        raise StoreError(
            f"{store.url}: the store test {first.name!r} failed: {first.detail}; check it with `sera doctor`"
        )
    if not accept_racy:
        raise StoreError(
            f"{store.url}: {first.detail}. Two processes could both hold the same run. Use a server with "
            "conditional puts, a local folder, or, alone on it and knowingly, "
            "--set execution.accept_racy_store=true"
        )
    return (
        f"WARNING: {store.url}: {first.detail}. It is used because execution.accept_racy_store is set: make "
        "sure that only one process at a time writes to it, or records may be overwritten"
    )


def _tried(name: str, act: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, act())
    except Exception as error:  # file systems raise their own exception classes
        return Finding(name, False, str(error) or type(error).__name__)


class _Trial:
    """The tests, and the files they leave to be removed."""

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder, self._data = store, folder, secrets.token_bytes(4096)
        self._written: list[str] = []
        self.acts = {
            "write": self._write,
            "read": self._read,
            "range": self._range,
            "file": self._file,
            "race": self._race,
        }

    def clean(self) -> None:
        """Remove everything that was written."""
        for path in self._written:
            _tried("clean", lambda path=path: str(self.store.remove(path)))

    def _path(self, name: str) -> str:
        path = f"{self.folder}/{name}"
        self._written.append(path)
        return path

    def _write(self) -> str:
        if self.store.create(self._path("record.json"), self._data) != self._data:
            raise StoreError("a new record does not contain the bytes that were written")
        return f"a record of {len(self._data)} bytes"

    def _read(self) -> str:
        if self.store.read_bytes(f"{self.folder}/record.json") != self._data:
            raise StoreError("a record read back does not contain the bytes that were written")
        return "read back the same bytes"

    def _range(self) -> str:
        if self.store.read_range(f"{self.folder}/record.json", 1000, 3000) != self._data[1000:3000]:
            raise StoreError("a ranged read returned the wrong bytes")
        return "the requested bytes"

    def _file(self) -> str:
        workspace = self.store.workspace(f"{self.folder}/files")
        fetched = None
        try:
            (workspace / "blob").write_bytes(self._data)
            blob: Blob = self.store.commit_file(workspace, f"{self.folder}/files", "blob")
            path = self._path("files/blob")
            fetched = self.store.fetch(path, blob.sha256, blob.bytes, "blob")
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
            if fetched is not None and fetched.is_relative_to(cache_folder()):
                shutil.rmtree(fetched.parent)
        return "written and read back, hash checked"

    def _race(self) -> str:
        winners = [self._winners(self._path(f"race-{number}.json")) for number in range(RACES)]
        if any(count != 1 for count in winners):
            raise StoreError(
                f"{RACERS} writers raced for a record {RACES} times, and {winners} of them won instead of one"
            )
        return f"of {RACERS} racing writers one won, {RACES} times"

    def _winners(self, path: str) -> int:
        """Number of racing writers whose create succeeded."""
        gate = threading.Barrier(RACERS)

        def write(number: int) -> bool:
            mine = f'{{"writer": {number}}}\n'.encode()
            gate.wait()
            return self.store.create(path, mine) == mine

        with ThreadPoolExecutor(RACERS) as pool:
            return sum(pool.map(write, range(RACERS)))
