"""What is believed of a record before anything is read or written: its paths, hashes and sizes.

Records come from a store that others write to as well; whatever does not look like ours is refused by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sera_core.artifacts.canonical import sha256_file
from sera_core.errors import InputError, StoreError

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+=@-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_RECORD_BYTES = 64 * 2**20
"""A record is a few kilobytes; nothing larger is read into memory."""
_MAX_PATH = 900
"""S3 allows keys of 1,024 bytes, prefix included."""

Progress = Callable[[int, int, str], None]
"""progress(done, total, unit)"""


@dataclass(frozen=True)
class Blob:
    """What a committed file holds."""

    sha256: str
    bytes: int


def check_path(url: str, path: str) -> str:
    """The path, if it lies below the store whatever reads it.

    Raises:
        StoreError: it is absolute, climbs, or holds a backslash, a control character or letters of other
            alphabets that may look like it does not.
    """
    segments = path.split("/")
    if len(path) <= _MAX_PATH and all(_SEGMENT.fullmatch(name) and name[-1] not in " ." for name in segments):
        return path
    raise StoreError(
        f"{url}: {path[:200]!r} is no path inside a store (plain names between slashes); the record that "
        "names it was tampered with, or was not written by sera-flow"
    )


def check_blob(url: str, path: str, sha256: str, size: int) -> None:
    """Refuse a file that a record describes as no file can be, before anything is fetched."""
    check_path(url, path)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise StoreError(
            f"{url}/{path}: {str(sha256)[:80]!r} is no sha256 (64 hex digits); its record was tampered with"
        )
    if not isinstance(size, int) or size < 0:
        raise StoreError(f"{url}/{path}: {size!r} is no size in bytes; its record was tampered with")


def check_file(path: Path, sha256: str, size: int) -> None:
    """Re-hash a local file that a record names.

    Raises:
        StoreError: it is missing, or holds something else.
    """
    if not path.exists():
        raise missing(path)
    if path.stat().st_size != size:
        raise wrong(path, f"{path.stat().st_size} bytes where the record says {size}")
    check_hash(path, sha256_file(path), sha256)


def check_hash(where: object, found: str, sha256: str) -> None:
    """Compare a hash with the recorded one."""
    if found != sha256:
        raise wrong(where, f"sha256 {found[:12]}… where the record says {sha256[:12]}…")


def missing(where: object) -> StoreError:
    """A file that a record names is not there."""
    return StoreError(
        f"{where}: missing from the store; restore it, or delete its step's done.json and run again"
    )


def wrong(where: object, what: str) -> StoreError:
    """A file is not what its record says."""
    return StoreError(
        f"{where}: {what}; the file was changed or cut off. Restore it, or delete its step and run again"
    )


def check_url(url: str) -> str:
    """A store's URL, if it holds no credentials: URLs stand in logs, manifests and Prefect's database.

    Raises:
        InputError: it has a user, a password, a query or a fragment; the message repeats none of them.
    """
    if "://" not in url:
        return url
    scheme, rest = url.split("://", 1)
    if any(letter in rest for letter in "@?#"):
        raise InputError(
            f"store {scheme}://…: a URL with a user, a password, '@', '?' or '#' is refused, for URLs are "
            "stored and shown. Give s3://bucket/prefix, and the credentials in AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    return url
