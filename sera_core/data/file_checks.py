"""Detect a pipe, device, Git LFS pointer or web page in place of a file, for a clear error message."""

import stat
from pathlib import Path

from sera_core.errors import InputError

_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def refuse_special(path: Path) -> Path:
    """Return the path unless it is a pipe, device or socket (or a link to one), whose reading may not end.

    A missing path is returned too; the caller reports it.

    Raises:
        InputError: it is one; the message says which.
    """
    try:
        kind = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):
        return path
    if kind is None:
        return path
    raise InputError(f"{path}: this is {kind}, not a file; use a regular file")


def placeholder_problem(data: bytes) -> str | None:
    """A message if the content is a Git LFS pointer or a web page instead of the file; else None."""
    start = data[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file: run `git lfs pull` in that folder"
    if start.startswith((b"<!doctype html", b"<html")):
        return (
            "this is a web page, not the file: download the file itself (on the hub, `resolve` instead of "
            "`blob`)"
        )
    return None
