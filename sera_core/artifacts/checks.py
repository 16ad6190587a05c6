"""Checks on the paths, hashes and sizes in records before they are used.

Other people may write to a store, so its records are untrusted input: every invalid value is an error.
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
"""Records are a few kilobytes; a larger file is refused before it is read into memory."""
_MAX_PATH = 900
"""S3 allows keys of 1,024 bytes, prefix included."""

Progress = Callable[[int, int, str], None]
"""progress(done, total, unit)"""


@dataclass(frozen=True)
class Blob:
    """Hash and size of a committed file."""

    sha256: str
    bytes: int


def check_path(url: str, path: str) -> str:
    """Return the path if it stays inside the store.

    Raises:
        StoreError: it is absolute, contains `..`, a backslash, a control character or a non-ASCII letter.
    """
    segments = path.split("/")
    if len(path) <= _MAX_PATH and all(_SEGMENT.fullmatch(name) and name[-1] not in " ." for name in segments):
        return path
    raise StoreError(
        f"{url}: {path[:200]!r} is not a path inside the store (plain names separated by slashes); the "
        "record with this path was modified, or was not written by sera-flow"
    )


def check_blob(url: str, path: str, sha256: str, size: int) -> None:
    """Check the path, hash and size that a record gives for a file, before it is fetched."""
    check_path(url, path)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise StoreError(
            f"{url}/{path}: {str(sha256)[:80]!r} is not a sha256 (64 hex digits); its record was modified"
        )
    if not isinstance(size, int) or size < 0:
        raise StoreError(f"{url}/{path}: {size!r} is not a size in bytes; its record was modified")


def check_file(path: Path, sha256: str, size: int) -> None:
    """Compare a local file with its recorded hash and size.

    Raises:
        StoreError: it is missing, or its content differs.
    """
    if not path.exists():
        raise missing_error(path)
    if path.stat().st_size != size:
        raise mismatch_error(path, f"{path.stat().st_size} bytes, but its record says {size}")
    check_hash(path, sha256_file(path), sha256)


def check_hash(where: object, found: str, sha256: str) -> None:
    """Compare a hash with the recorded one."""
    if found != sha256:
        raise mismatch_error(where, f"sha256 {found[:12]}…, but its record says {sha256[:12]}…")


def missing_error(where: object) -> StoreError:
    """The error for a recorded file that does not exist."""
    return StoreError(
        f"{where}: missing from the store; restore it, or delete its step's done.json and run again"
    )


def mismatch_error(where: object, what: str) -> StoreError:
    """The error for a file that does not match its record."""
    return StoreError(
        f"{where}: {what}; the file was modified or truncated. Restore it, or delete its step and run again"
    )


def check_url(url: str) -> str:
    """Return a store's URL if it contains no credentials: logs, manifests and Prefect's database show it.

    Raises:
        InputError: it has a user, password, query or fragment; the message does not repeat them.
    """
    if "://" not in url:
        return url
    scheme, rest = url.split("://", 1)
    if any(letter in rest for letter in "@?#"):
        raise InputError(
            f"store {scheme}://…: the URL must not contain a user, a password, '@', '?' or '#', because URLs "
            "are stored and shown. Use s3://bucket/prefix and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
            "and AWS_ENDPOINT_URL"
        )
    return url
