"""A store below a prefix of a bucket, through s3fs. A record is committed by a conditional put.

Endpoint, region and credentials come from the environment, never from a URL: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_PROFILE and the like, and s3fs's own FSSPEC_S3_….
"""

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Coroutine
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sera_core.artifacts.checks import (
    Blob,
    Progress,
    check_blob,
    check_file,
    check_path,
    check_url,
    missing_error,
)
from sera_core.artifacts.folders import cache_folder
from sera_core.artifacts.local_store import disk_full_error
from sera_core.artifacts.scratch import scratch_folder
from sera_core.errors import InputError, StoreError

if TYPE_CHECKING:
    from sera_core.artifacts.s3_requests import Patience

T = TypeVar("T")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
ENVIRONMENT = ("AWS_", "FSSPEC_S3_")
"""Prefixes of the environment variables for endpoint, region and credentials."""
_CREATED_ONCE = re.compile(r"steps/[^/]+/[^/]+/(done|part-\d+)\.json|runs/[^/]+/(run|round)-\d+\.json")
"""Records that are never replaced, so they can be cached: re-reading them is half of a round's requests."""
_LAST_SECONDS = 20.0
"""Maximum time for an interrupted transfer to clean up."""


class _Environment(tuple[tuple[str, str], ...]):
    """Names and values of environment variables; repr hides the values, which contain credentials."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{', '.join(name for name, _ in self)}>"


class S3Store:
    """A prefix of a bucket. Correctness never depends on a listing."""

    def __init__(self, url: str, patience: "Patience | None" = None, remember: bool = False) -> None:
        self.url = check_url(url).rstrip("/")
        self.prefix = self.url.removeprefix("s3://")
        self.bucket, _, self._below = self.prefix.partition("/")
        if not _BUCKET.fullmatch(self.bucket):
            raise InputError(f"store {url!r}: {self.bucket!r} is not a bucket name; use s3://bucket/prefix")
        if self._below:
            check_path(self.url, self._below)
        self._environment = _Environment(
            sorted((name, value) for name, value in os.environ.items() if name.startswith(ENVIRONMENT))
        )
        if any("ENDPOINT" in name and "@" in value for name, value in self._environment):
            raise InputError(
                "AWS_ENDPOINT_URL contains a user or a password, which error messages would show; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        self._patience = patience
        self._known = _known(self._environment, self.prefix) if remember else None
        self._verified: set[tuple[str, int, int]] = set()
        self._connected: dict[tuple[int, int], Any] = {}
        self._filesystem(tries=1)  # connect now: the environment may change later

    @property
    def fs(self) -> Any:
        """s3fs's file system, with its own retries, for upkeep."""
        return self._filesystem(tries=5)

    def read_bytes(self, path: str) -> bytes | None:
        known = None if self._known is None else self._known.get(path)
        return known or self._remembered(path, self._do(self._requests().read(self._key(path))))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._do(self._requests().read_range(self._key(path), start, stop))

    def create(self, path: str, data: bytes) -> bytes:
        winner = self._do(self._requests().create(self._key(path), data))
        self._remembered(path, winner)
        return winner

    def remove(self, path: str) -> None:
        self._do(self._requests().delete(self._key(path)))

    def workspace(self, path: str) -> Path:
        check_path(self.url, path)
        return scratch_folder()

    def commit_file(
        self, workspace: Path, path: str, relative: str, progress: Progress | None = None
    ) -> Blob:
        from sera_core.artifacts.s3_transfer import upload

        key = self._key(f"{path}/{relative}")
        return self._do(upload(self._requests(), key, workspace / relative, progress or _silent))

    def fetch(self, path: str, sha256: str, size: int, name: str, progress: Progress | None = None) -> Path:
        check_blob(self.url, path, sha256, size)
        check_path(self.url, name)
        local = cache_folder() / sha256 / Path(name).name
        if not self._holds(local, sha256, size):
            self._download(path, Blob(sha256, size), local, progress or _silent)
            self._verified.add(_seen(local))
        return local

    def keep(self, file: Path, sha256: str, name: str) -> None:
        local = cache_folder() / sha256 / Path(name).name
        with suppress(OSError):  # another file system, or it is there: then it is downloaded, or was
            local.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, local)

    def names(self, path: str) -> list[str]:
        from sera_core.artifacts.s3_requests import Listed

        below = self._key(path) + "/"

        async def found() -> list[str]:
            entries = [entry async for entry in self._requests().listing(below, delimiter="/")]
            return [entry.key if isinstance(entry, Listed) else entry for entry in entries]

        return sorted(key.removeprefix(below).strip("/") for key in self._do(found()) if key != below)

    def listing_error(self, error: Exception, path: str) -> Exception:
        """A clear error for an s3fs error in a listing."""
        return self._requests().listing_error(error, self._key(path))

    # ---------------------------------------------------------------------------------------- how it is done

    def _key(self, path: str) -> str:
        check_path(self.url, path)
        return f"{self._below}/{path}" if self._below else path

    def _remembered(self, path: str, data: bytes | None) -> bytes | None:
        if self._known is not None and data is not None and _CREATED_ONCE.fullmatch(path):
            self._known[path] = data
        return data

    def _requests(self) -> Any:
        from sera_core.artifacts.s3_requests import Patience, Requests

        return Requests(self._filesystem(tries=1), self.bucket, self._patience or Patience())

    def _filesystem(self, tries: int) -> Any:
        process = os.getpid()  # no client survives a fork
        if (process, tries) not in self._connected:
            self._connected[process, tries] = _connect(process, self._environment, tries)
        return self._connected[process, tries]

    def _holds(self, local: Path, sha256: str, size: int) -> bool:
        """Whether the cache has the file with this hash and size; a different file is removed."""
        if not local.exists():
            return False
        if _seen(local) in self._verified:
            return True
        try:
            check_file(local, sha256, size)
        except StoreError:
            local.unlink()
            return False
        self._verified.add(_seen(local))
        return True

    def _download(self, path: str, blob: Blob, local: Path, progress: Progress) -> None:
        from sera_core.artifacts.s3_transfer import download

        scratch = scratch_folder()
        try:
            self._do(download(self._requests(), self._key(path), scratch / local.name, blob, progress))
            local.parent.mkdir(parents=True, exist_ok=True)
            (scratch / local.name).replace(local)
        except FileNotFoundError:
            raise missing_error(f"{self.url}/{path}") from None
        except OSError as error:
            if (trouble := disk_full_error(error, local)) is not None:
                raise trouble from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on fsspec's loop. If interrupted here, the work is cancelled there and cleans up."""
        from fsspec.asyn import get_loop

        over = threading.Event()

        async def whole() -> T:
            try:
                return await work
            finally:
                over.set()

        future = asyncio.run_coroutine_threadsafe(whole(), get_loop())
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                over.wait(_LAST_SECONDS)
            raise


@lru_cache(maxsize=8)
def _connect(process: int, environment: _Environment, tries: int) -> Any:
    """One client for all stores of a process, until the environment changes."""
    import s3fs
    from botocore.exceptions import BotoCoreError

    from sera_core.artifacts.s3_requests import S3_CONFIG

    try:
        fs = s3fs.S3FileSystem(
            use_listings_cache=False,
            config_kwargs=S3_CONFIG,
            session=_session(process, environment),
            skip_instance_cache=True,
        )
        fs.retries = tries
        fs.connect()  # creates a client; sends nothing yet
    except (BotoCoreError, ValueError) as error:
        raise InputError(f"cannot configure S3 from the environment: {error}; check AWS_…") from error
    return fs


@lru_cache(maxsize=4)
def _session(process: int, environment: _Environment) -> Any:
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register_component("data_loader", _definitions())
    return session


@lru_cache
def _definitions() -> Any:
    """botocore's definition of S3: loading takes 0.2 s, so it is done once and shared with forks."""
    from botocore.loaders import create_loader

    return create_loader()


@lru_cache(maxsize=8)
def _known(environment: _Environment, prefix: str) -> dict[str, bytes]:
    """Cache of the records that this process has read, a few kilobytes each."""
    return {}


def _seen(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file), found.st_mtime_ns, found.st_size


def _silent(done: int, total: int, unit: str) -> None:
    """Report no progress."""
