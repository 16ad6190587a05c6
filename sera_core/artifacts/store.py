"""One store on fsspec: immutable files, and records that are created once and never replaced.

    steps/<step>/<key>/<attempt>/…     files of one attempt at a step
    steps/<step>/<key>/part-00007.json one finished shard or checkpoint
    steps/<step>/<key>/done.json       the step's record: written last; the step exists when this does
    runs/<run>/…                       a run's configuration, round manifests, reviews

Correctness rests on `create_json` alone: of two writers one wins, and both go on with the winner's record.
"""

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from sera_core.artifacts.canonical import finite, sha256_file
from sera_core.errors import InputError, StoreError

_S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "max_attempts": 4},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "s3": {"addressing_style": "path"},
}


class Store(Protocol):
    """Where artifacts live. Paths are relative, with forward slashes."""

    url: str

    def read_bytes(self, path: str) -> bytes | None:
        """The record's bytes, or None when it does not exist."""
        ...

    def create(self, path: str, data: bytes) -> bytes:
        """Write a record unless it exists; returns the bytes that are there now (the winner's)."""
        ...

    def workspace(self, path: str) -> Path:
        """A local folder to write an attempt's files into."""
        ...

    def commit_file(self, workspace: Path, path: str, relative: str) -> None:
        """Make one file of a workspace durable below `path`."""
        ...

    def fetch(self, path: str, sha256: str, size: int, name: str) -> Path:
        """A local path that holds the file, its hash checked."""
        ...

    def names(self, path: str) -> list[str]:
        """Names directly below a folder (for people: no step finds its inputs by listing)."""
        ...


def open_store(url: str) -> Store:
    """Open a store: a local folder, or s3://bucket/prefix (endpoint and credentials from the environment)."""
    if "://" not in url or url.startswith("file://"):
        return LocalStore(Path(url.removeprefix("file://")))
    if url.startswith("s3://"):
        return S3Store(url)
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
    except ValueError as error:
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


def _wrong(path: object, what: str) -> StoreError:
    return StoreError(
        f"{path}: {what}; the file was changed or cut off. Restore it, or delete its step and run again"
    )


def _check(path: Path, sha256: str, size: int) -> None:
    if not path.exists():
        raise StoreError(
            f"{path}: missing from the store; restore it, or delete its step's done.json and run again"
        )
    if path.stat().st_size != size:
        raise _wrong(path, f"{path.stat().st_size} bytes where the record says {size}")
    found = sha256_file(path)
    if found != sha256:
        raise _wrong(path, f"sha256 {found[:12]}… where the record says {sha256[:12]}…")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LocalStore:
    """A folder. A record is committed by a hard link, which fails if the name is taken."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(root)
        self._verified: set[tuple[str, int, int]] = set()

    def read_bytes(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, path: str, data: bytes) -> bytes:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:16]}"
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError:
                return target.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(target.parent)
        return data

    def workspace(self, path: str) -> Path:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit_file(self, workspace: Path, path: str, relative: str) -> None:
        file = workspace / relative
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        _fsync_folder(file.parent)

    def fetch(self, path: str, sha256: str, size: int, name: str) -> Path:
        file = self.root / path
        if file.exists():
            seen = (path, file.stat().st_mtime_ns, file.stat().st_size)
            if seen not in self._verified:
                _check(file, sha256, size)
                self._verified.add(seen)
            return file
        _check(file, sha256, size)
        return file

    def names(self, path: str) -> list[str]:
        folder = self.root / path
        return sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []


class S3Store:
    """A prefix of a bucket through s3fs. A record is committed by a conditional put."""

    def __init__(self, url: str) -> None:
        import s3fs

        self.url = url.rstrip("/")
        self.prefix = self.url.removeprefix("s3://")
        self.fs = s3fs.S3FileSystem(
            use_listings_cache=False, config_kwargs=_S3_CONFIG, skip_instance_cache=True
        )
        self._cache = Path(os.environ.get("SERA_CACHE", Path.home() / ".cache" / "sera-flow"))

    def read_bytes(self, path: str) -> bytes | None:
        try:
            return cast(bytes, self.fs.cat_file(f"{self.prefix}/{path}"))
        except FileNotFoundError:
            return None

    def create(self, path: str, data: bytes) -> bytes:
        try:
            self.fs.pipe_file(f"{self.prefix}/{path}", data, mode="create")
            return data
        except FileExistsError:
            pass
        except OSError as error:  # Ceph and Swift answer a refused create with EINVAL
            if error.errno != errno.EINVAL:
                raise
        # A create whose answer was lost is retried and refused for our own write: what is there decides.
        winner = self.read_bytes(path)
        if winner is None:
            raise StoreError(
                f"{self.url}/{path}: the store refused to create a record that it does not hold; try again"
            )
        return winner

    def workspace(self, path: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="sera-"))

    def commit_file(self, workspace: Path, path: str, relative: str) -> None:
        self.fs.put_file(str(workspace / relative), f"{self.prefix}/{path}/{relative}")

    def fetch(self, path: str, sha256: str, size: int, name: str) -> Path:
        local = self._cache / sha256 / Path(name).name
        if not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            temporary = local.with_name(f".{local.name}.{uuid.uuid4().hex[:8]}")
            try:
                self.fs.get_file(f"{self.prefix}/{path}", str(temporary))
                _check(temporary, sha256, size)
                temporary.replace(local)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            _check(local, sha256, size)
        return local

    def names(self, path: str) -> list[str]:
        try:
            return sorted(
                p.rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(f"{self.prefix}/{path}", detail=False)
            )
        except FileNotFoundError:
            return []


def remove_workspace(store: Store, workspace: Path) -> None:
    """Delete the local copy of an attempt whose files now live elsewhere."""
    if isinstance(store, S3Store):
        shutil.rmtree(workspace, ignore_errors=True)
