"""A store in a folder. A record is committed by a hard link, which fails if the name is taken."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sera_core.artifacts.canonical import sha256_file
from sera_core.artifacts.checks import (
    MAX_RECORD_BYTES,
    Blob,
    Progress,
    check_blob,
    check_file,
    check_path,
    missing_error,
)
from sera_core.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


class LocalStore:
    """A folder. Nothing outside it is read or written, even if a record or a link points there."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(root)
        self._verified: set[tuple[str, int, int]] = set()

    def read_bytes(self, path: str) -> bytes | None:
        file = self.inside(path)
        try:
            size = _size(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if size > MAX_RECORD_BYTES:
            raise StoreError(f"{file}: {size:,} bytes are too many for a record; the file was modified")
        with _clear_errors(file):
            return file.read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        file = self.inside(path)
        with _clear_errors(file), file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def create(self, path: str, data: bytes) -> bytes:
        target = self.inside(path)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:16]}"
        with _clear_errors(target):
            _make_folder(target.parent)
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
                with suppress(OSError):
                    temporary.unlink()
            _fsync_folder(target.parent)
        return data

    def remove(self, path: str) -> None:
        file = self.inside(path)
        with _clear_errors(file):
            file.unlink(missing_ok=True)

    def workspace(self, path: str) -> Path:
        folder = self.inside(path)
        with _clear_errors(folder):
            _make_folder(folder)
        return folder

    def commit_file(
        self, workspace: Path, path: str, relative: str, progress: Progress | None = None
    ) -> Blob:
        self.inside(f"{path}/{relative}")
        file = workspace / relative
        with _clear_errors(file):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            for folder in file.parents[: len(Path(relative).parts)]:
                _fsync_folder(folder)
            return Blob(sha256_file(file), file.stat().st_size)

    def fetch(self, path: str, sha256: str, size: int, name: str, progress: Progress | None = None) -> Path:
        check_blob(self.url, path, sha256, size)
        file = self.inside(path)
        try:
            _size(file)
        except (FileNotFoundError, NotADirectoryError):
            raise missing_error(file) from None
        found = file.stat()
        seen = (path, found.st_mtime_ns, found.st_size)
        if seen not in self._verified or found.st_size != size:
            check_file(file, sha256, size)
            self._verified.add(seen)
        return file

    def keep(self, file: Path, sha256: str, name: str) -> None:
        """Nothing to do: the file is local already."""

    def names(self, path: str) -> list[str]:
        folder = self.inside(path)
        return sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []

    def inside(self, path: str) -> Path:
        """Local path of a file, if neither the path nor a link in it leads elsewhere.

        Raises:
            StoreError: a link leads out of the store or to another place in it.
        """
        return self.plain(check_path(self.url, path))

    def plain(self, path: str) -> Path:
        """As `inside`, for a path from a listing, whose names need not follow our rules."""
        file = self.root / path
        root, real = os.path.realpath(self.root), os.path.realpath(file)
        if Path(real) == Path(root) / path:
            return file
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            raise StoreError(
                f"{file}: a link leads out of the store, to {real}. Replace the link with what it points to"
            )
        raise StoreError(
            f"{file}: a link leads to another place in the store, {real}; a store may contain only plain "
            "files and folders. Replace the link with what it points to"
        )


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each synced to disk so that a power cut loses no record."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)


def _size(file: Path) -> int:
    """Bytes of a file; a folder, pipe or device in its place is an error."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{file}: not a regular file, so sera-flow did not write it. Remove it")
    return found.st_size


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _clear_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or missing permissions into a StoreError."""
    try:
        yield
    except OSError as error:
        if (trouble := disk_full_error(error, where)) is not None:
            raise trouble from error
        if error.errno in _CLOSED and not isinstance(error, StoreError):
            raise StoreError(
                f"{where}: cannot read or write the store here ({error}); nothing was committed. Choose a "
                "--store that you can write to, on a file system with hard links"
            ) from error
        raise


def disk_full_error(error: Exception, where: Path) -> StoreError | None:
    """The error for a write that failed on a full disk; None for any other error.

    Libraries wrap the system's error in their own classes, so its text is checked too.
    """
    if isinstance(error, StoreError):
        return None
    if getattr(error, "errno", None) in _FULL or "No space left on device" in str(error):
        return StoreError(
            f"{where}: the disk is full ({error}); no incomplete file was committed. Free some space, or "
            "choose another --store, and run again"
        )
    return None
