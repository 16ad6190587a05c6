"""Store operations for leases, gc and verify: overwrite a heartbeat, read ages, list, delete.

Steps and runs do not depend on them. Ages are measured by the store's clock, because machines that share a
store may disagree on the time.
"""

import errno
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from sera_core.artifacts.canonical import sha256_file
from sera_core.artifacts.folders import write_whole
from sera_core.artifacts.recorded import entries, unrecorded_error
from sera_core.artifacts.store import LocalStore, S3Store, Store
from sera_core.errors import InputError

LOG = logging.getLogger("sera.store")
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_CHUNK = 8 * 2**20
_DELETERS = 16


@dataclass(frozen=True)
class Stored:
    """An object of the store; age in seconds since its last write."""

    path: str
    bytes: int
    age: float


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was neither completed nor aborted."""

    path: str
    age: float
    id: str


class Upkeep(Protocol):
    """Paths are relative to the store, with forward slashes."""

    def replace(self, path: str, data: bytes) -> None:
        """Write a small object atomically, replacing any existing one."""
        ...

    def age(self, path: str) -> float | None:
        """Seconds since the object was last written; None when it does not exist."""
        ...

    def listing(self, path: str) -> Iterator[Stored]:
        """Everything below a folder, temporary files included."""
        ...

    def files_below(self, path: str) -> Iterator[str]:
        """Relative paths of everything below a folder, without ages (so nothing has to be written)."""
        ...

    def refuse_links(self) -> None:
        """Refuse a store that contains a link."""
        ...

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects, in any order; a missing one is no error."""
        ...

    def uploads(self) -> list[Upload]:
        """Unfinished multipart uploads."""
        ...

    def abort(self, upload: Upload) -> None:
        """Abort an unfinished upload and free its storage."""
        ...

    def hashed(self, path: str) -> tuple[str, int] | None:
        """sha256 and bytes of the object in the store, ignoring local copies; None when it is missing."""
        ...


def upkeep(store: Store) -> Upkeep:
    """The `Upkeep` implementation of a store; a store class of your own gives it by a method `upkeep()`.

    Raises:
        InputError: it has no such method.
    """
    if isinstance(store, LocalStore):
        return LocalUpkeep(store)
    if isinstance(store, S3Store):
        return S3Upkeep(store)
    own = getattr(store, "upkeep", None)
    if own is None:
        raise InputError(
            f"store {store.url}: its class {type(store).__name__} has no method upkeep(), which leases, "
            "verify and gc need (protocol Upkeep in sera_core/artifacts/upkeep.py); add it, or derive from "
            "LocalStore"
        )
    return own()


class LocalUpkeep:
    """Upkeep of a local folder; its clock is that of its file system."""

    def __init__(self, store: LocalStore) -> None:
        self.store, self.root = store, store.root

    def replace(self, path: str, data: bytes) -> None:
        write_whole(self.store.inside(path), data)

    def age(self, path: str) -> float | None:
        file = self.store.inside(path)
        with suppress(FileNotFoundError, NotADirectoryError):
            written = file.stat().st_mtime
            return max(0.0, self._now(file.parent) - written)
        return None

    def listing(self, path: str) -> Iterator[Stored]:
        top = self.store.plain(path)
        if not top.is_dir():
            return
        now = self._now(top)
        for folder, folders, names in os.walk(top):
            for name in [*names, *(name for name in folders if Path(folder, name).is_symlink())]:
                file = Path(folder) / name
                with suppress(FileNotFoundError):  # a temporary file that was renamed meanwhile
                    found = file.lstat()
                    relative = file.relative_to(self.root).as_posix()
                    yield Stored(relative, found.st_size, max(0.0, now - found.st_mtime))

    def files_below(self, path: str) -> Iterator[str]:
        for name, _ in entries(self.store.inside(path)):
            yield name

    def refuse_links(self) -> None:
        for name, is_link in entries(self.root):
            if is_link:
                self.store.plain(name)
                raise unrecorded_error(self.root / name, is_link)  # `plain` accepts a link to itself

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            (self.store.plain(str(Path(path).parent)) / Path(path).name).unlink(missing_ok=True)
        for folder in {Path(path).parent for path in paths}:
            self._remove_empty(folder)

    def _remove_empty(self, folder: Path) -> None:
        """Remove the folder and its parents while they are empty; `steps` and `runs` stay."""
        with suppress(OSError):  # not empty, or gone already
            while len(folder.parts) > 1:
                (self.root / folder).rmdir()
                folder = folder.parent

    def uploads(self) -> list[Upload]:
        return []

    def abort(self, upload: Upload) -> None:
        """Never needed: a folder has no multipart uploads."""

    def hashed(self, path: str) -> tuple[str, int] | None:
        file = self.store.inside(path)
        return (sha256_file(file), file.stat().st_size) if file.is_file() else None

    def _now(self, folder: Path) -> float:
        """The file system's time, read from a new file: a shared one can differ from this machine's.

        If the store is read-only, this machine's time is used.
        """
        probe = folder / f".clock.{secrets.token_hex(8)}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            _say_own_clock(self.root)
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()


@cache
def _say_own_clock(root: Path) -> None:
    LOG.warning("%s: read-only, so ages are measured by this machine's clock", root)


class S3Upkeep:
    """Upkeep of a prefix of a bucket; its clock is the server's."""

    def __init__(self, store: S3Store) -> None:
        self.store, self.fs, self.prefix = store, store.fs, store.prefix
        self.bucket, _, self.below = self.prefix.partition("/")

    def replace(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.prefix}/{path}", data)

    def age(self, path: str) -> float | None:
        with suppress(FileNotFoundError):
            answer = self._call("head_object", Key=self._key(path))
            return max(0.0, (_date(answer) - answer["LastModified"]).total_seconds())
        return None

    def listing(self, path: str) -> Iterator[Stored]:
        try:
            now = _date(self._call("list_objects_v2", Prefix=self._key(path), MaxKeys=1))
        except (OSError, RecursionError) as error:
            raise self.store.listing_error(error, path) from error
        found = cast(dict[str, Any], self.fs.find(f"{self.prefix}/{path}", detail=True))
        for name, about in found.items():
            relative = name.removeprefix(f"{self.prefix}/")
            yield Stored(relative, about["size"], max(0.0, (now - about["LastModified"]).total_seconds()))

    def files_below(self, path: str) -> Iterator[str]:
        for name in self.fs.find(f"{self.prefix}/{path}/"):
            yield name.removeprefix(f"{self.prefix}/{path}/")

    def refuse_links(self) -> None:
        """A bucket has no links."""

    def delete(self, paths: Sequence[str]) -> None:
        # One request per object: the bulk request needs a checksum that some servers reject.
        with ThreadPoolExecutor(_DELETERS) as pool:
            list(pool.map(lambda path: self.fs.rm_file(f"{self.prefix}/{path}"), paths))

    def uploads(self) -> list[Upload]:
        found: list[Upload] = []
        marker: dict[str, str] = {}
        while True:
            try:
                answer = self._call("list_multipart_uploads", Prefix=self._key(""), **marker)
            except PermissionError:  # read-only credentials often lack this permission
                LOG.warning("s3://%s: no permission to list unfinished uploads; skipping them", self.prefix)
                return found
            now = _date(answer)
            found += [
                Upload(
                    upload["Key"].removeprefix(self._key("")),
                    max(0.0, (now - upload["Initiated"]).total_seconds()),
                    upload["UploadId"],
                )
                for upload in answer.get("Uploads", [])
            ]
            if not answer.get("IsTruncated"):
                return found
            marker = {
                "KeyMarker": answer["NextKeyMarker"],
                "UploadIdMarker": answer["NextUploadIdMarker"],
            }

    def abort(self, upload: Upload) -> None:
        with suppress(FileNotFoundError):  # completed or aborted meanwhile
            self._call("abort_multipart_upload", Key=self._key(upload.path), UploadId=upload.id)

    def hashed(self, path: str) -> tuple[str, int] | None:
        sha, size = hashlib.sha256(), 0
        try:
            with self.fs.open(
                f"{self.prefix}/{path}", "rb", block_size=_CHUNK, cache_type="readahead"
            ) as file:
                while data := cast(bytes, file.read(_CHUNK)):
                    sha.update(data)
                    size += len(data)
        except FileNotFoundError:
            return None
        return sha.hexdigest(), size

    def _key(self, path: str) -> str:
        return f"{self.below}/{path}" if self.below else path

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self.fs.call_s3(method, Bucket=self.bucket, **arguments)


def _date(answer: dict[str, Any]) -> datetime:
    """Time of the response by the server's clock."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
