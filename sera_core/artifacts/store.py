"""The store: immutable files, and records that are created once and never replaced.

    steps/<step>/<key>/<attempt>/…     files of one attempt at a step
    steps/<step>/<key>/part-00007.json one finished shard or checkpoint
    steps/<step>/<key>/done.json       the step's record, written last: the step exists when this does
    runs/<run>/…                       a run's configuration, round manifests, reviews

Correctness depends only on `create_json`: if two processes write a record, both continue with the first one.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from sera_core.artifacts.canonical import finite
from sera_core.artifacts.checks import Blob, Progress, check_url
from sera_core.artifacts.local_store import LocalStore
from sera_core.artifacts.s3_store import S3Store
from sera_core.data.size_limits import DEPTH, is_deep
from sera_core.data.sources import json_value
from sera_core.errors import InputError, StoreError
from sera_core.extensions import provided
from sera_core.guards.shown import shown_line

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

_LARGEST = 1e300
"""Largest number in a record, so that arithmetic does not overflow."""


def default_store() -> str:
    """The store if no --store is given: SERA_STORE, unless it is empty, else the default."""
    return os.environ.get("SERA_STORE") or "./sera-store"


class Store(Protocol):
    """Where artifacts live. Paths are relative, with forward slashes."""

    url: str

    def read_bytes(self, path: str) -> bytes | None:
        """The record's bytes, or None when it does not exist."""
        ...

    def create(self, path: str, data: bytes) -> bytes:
        """Write a record unless it exists; returns the bytes that are stored now."""
        ...

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file if it exists; only for store tests and old checkpoints."""
        ...

    def workspace(self, path: str) -> Path:
        """A local folder to write an attempt's files into."""
        ...

    def commit_file(
        self, workspace: Path, path: str, relative: str, progress: Progress | None = None
    ) -> Blob:
        """Store one file of a workspace below `path`; returns its hash and size."""
        ...

    def fetch(self, path: str, sha256: str, size: int, name: str, progress: Progress | None = None) -> Path:
        """Local path of the file, after a check of its size and hash."""
        ...

    def keep(self, file: Path, sha256: str, name: str) -> None:
        """Cache a newly committed file for later reads on this machine (its hash is still checked)."""
        ...

    def names(self, path: str) -> list[str]:
        """Names directly below a folder; none if it does not exist.

        For display, and to see which shards need not be done again: steps never find inputs by listing.
        """
        ...


def open_store(url: str, remember: bool = False) -> Store:
    """Open a store: a local folder, or s3://bucket/prefix (endpoint and credentials from the environment).

    Args:
        url: the folder or URL.
        remember: cache create-only records in this process; for running, not for verify and gc.
    """
    check_url(url)
    scheme = url.partition("://")[0] if "://" in url else "file"
    if (kind := SCHEMES.get(scheme) or provided("SERA_STORES").get(scheme)) is not None:
        return kind(url, remember)
    raise InputError(
        f"store {url!r}: only a local folder or s3://bucket/prefix can hold a store; give one of these"
    )


SCHEMES: dict[str, Callable[[str, bool], Store]] = {
    "file": lambda url, _: LocalStore(Path(url.removeprefix("file://"))),
    "s3": lambda url, remember: S3Store(url, remember=remember),
}
"""What opens a store, by the scheme of its URL: (url, remember) -> Store. A module that SERA_EXTENSIONS names
may add to it in a dictionary SERA_STORES."""


def read_json(store: Store, path: str) -> Any | None:
    """A record's JSON, or None if it does not exist; invalid JSON is a StoreError."""
    data = store.read_bytes(path)
    return None if data is None else parsed(data, f"{store.url}/{path}")


def parsed(data: bytes, where: str) -> Any:
    """The JSON of a record, as `create_json` writes it.

    Raises:
        StoreError: it is not UTF-8 JSON, repeats a key, is nested too deeply, or contains a number that is
            not finite or a lone surrogate.
    """
    try:
        value = json_value(data.decode(), parse_int=_whole, parse_float=_finite, parse_constant=_no_number)
        if value is None:  # null would read like a missing record
            raise ValueError("null")
        if is_deep(value):
            raise ValueError(f"lists and objects nested more than {DEPTH} deep")
        if b"\\ud" in data.lower():  # perhaps a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        said = shown_line(str(error))
        raise StoreError(
            f"{where}: not valid JSON ({said:.200}); restore it from a copy of the store"
        ) from error
    return value


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) > _LARGEST:
        raise ValueError("a number is too large")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) > _LARGEST:
        raise ValueError(f"the number {text:.20} is too large")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def create_json(store: Store, path: str, value: Any) -> tuple[Any, bool]:
    """Create a record. Returns (the record that is stored now, whether this call wrote it)."""
    data = (json.dumps(finite(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    winner = store.create(path, data)
    return parsed(winner, f"{store.url}/{path}"), winner == data


def numbered(store: Store, pattern: str, first: int = 0) -> Iterator[tuple[int, Any]]:
    """Records of a numbered series without gaps (`runs/demo/round-{:03d}.json`), in order."""
    number = first
    while (record := read_json(store, pattern.format(number))) is not None:
        yield number, record
        number += 1


def remove_workspace(store: Store, workspace: Path) -> None:
    """Delete the local copy of an attempt whose files are in a remote store."""
    if isinstance(store, S3Store):
        shutil.rmtree(workspace, ignore_errors=True)
