"""One store on fsspec: immutable files, and records that are created once and never replaced.

    steps/<step>/<key>/<attempt>/…     files of one attempt at a step
    steps/<step>/<key>/part-00007.json one finished shard or checkpoint
    steps/<step>/<key>/done.json       the step's record: written last; the step exists when this does
    runs/<run>/…                       a run's configuration, round manifests, reviews

Correctness rests on `create_json` alone: of two writers one wins, and both go on with the winner's record.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sera_core.artifacts.canonical import finite
from sera_core.artifacts.checks import Blob, Progress, check_url
from sera_core.artifacts.local_store import LocalStore
from sera_core.artifacts.s3_store import S3Store
from sera_core.errors import InputError, StoreError

__all__ = [
    "LocalStore",
    "S3Store",
    "Store",
    "create_json",
    "default_store",
    "numbered",
    "open_store",
    "read_json",
    "remove_workspace",
]


def default_store() -> str:
    """The store when none is named; an empty SERA_STORE names none."""
    return os.environ.get("SERA_STORE") or "./sera-store"


class Store(Protocol):
    """Where artifacts live. Paths are relative, with forward slashes."""

    url: str

    def read_bytes(self, path: str) -> bytes | None:
        """The record's bytes, or None when it does not exist."""
        ...

    def create(self, path: str, data: bytes) -> bytes:
        """Write a record unless it exists; returns the bytes that are there now (the winner's)."""
        ...

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, whether it is there or not: of a trial of the store, or an old checkpoint."""
        ...

    def workspace(self, path: str) -> Path:
        """A local folder to write an attempt's files into."""
        ...

    def commit_file(
        self, workspace: Path, path: str, relative: str, progress: Progress | None = None
    ) -> Blob:
        """Make one file of a workspace durable below `path`; returns what it holds."""
        ...

    def fetch(self, path: str, sha256: str, size: int, name: str, progress: Progress | None = None) -> Path:
        """A local path that holds the file, its size and its hash checked."""
        ...

    def keep(self, file: Path, sha256: str, name: str) -> None:
        """A file that was just committed may serve later reads on this machine, its hash checked as ever."""
        ...

    def names(self, path: str) -> list[str]:
        """Names directly below a folder (for people: no step finds its inputs by listing)."""
        ...


def open_store(url: str, remember: bool = False) -> Store:
    """Open a store: a local folder, or s3://bucket/prefix (endpoint and credentials from the environment).

    Args:
        url: Where it is.
        remember: For work on a run: a record that is created once is asked for once by this process. Checking
            and clearing up ask each time.
    """
    check_url(url)
    if "://" not in url or url.startswith("file://"):
        return LocalStore(Path(url.removeprefix("file://")))
    if url.startswith("s3://"):
        return S3Store(url, remember=remember)
    raise InputError(
        f"store {url!r}: only a local folder or s3://bucket/prefix can hold a store; give one of these"
    )


def read_json(store: Store, path: str) -> Any | None:
    """A record's JSON, or None; a record that is not JSON is named."""
    data = store.read_bytes(path)
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{store.url}/{path}: not valid JSON ({error}); restore it from a copy of the store"
        ) from error


def create_json(store: Store, path: str, value: Any) -> tuple[Any, bool]:
    """Create a record. Returns (the record that is there now, whether it is ours)."""
    data = (json.dumps(finite(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    winner = store.create(path, data)
    return json.loads(winner), winner == data


def numbered(store: Store, pattern: str, first: int = 0) -> Iterator[tuple[int, Any]]:
    """Records of a dense series (`runs/demo/round-{:03d}.json`), probed by name and in order."""
    number = first
    while (record := read_json(store, pattern.format(number))) is not None:
        yield number, record
        number += 1


def remove_workspace(store: Store, workspace: Path) -> None:
    """Delete the local copy of an attempt whose files now live elsewhere."""
    if isinstance(store, S3Store):
        shutil.rmtree(workspace, ignore_errors=True)
