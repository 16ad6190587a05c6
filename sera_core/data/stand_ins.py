"""What lies where a file was meant to be: named as what it is, not as what it fails to parse as."""

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
    """The path, unless it is a pipe, a device or a socket, or a link to one: reading it may never end.

    A path that is not there is left to its reader.

    Raises:
        InputError: it is one; the message says which.
    """
    try:
        kind = _SPECIAL.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):
        return path
    if kind is None:
        return path
    raise InputError(f"{path}: is {kind}, not a file, and reading it may never end; give a plain file")


def stand_in(data: bytes) -> str | None:
    """What a file is that begins so, and what to do: a Git LFS pointer or a web page; None for any other."""
    start = data[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file: run `git lfs pull` in that folder"
    if start.startswith((b"<!doctype html", b"<html")):
        return (
            "this is a web page, not the file: download the file itself (on the hub, `resolve` instead of "
            "`blob`)"
        )
    return None
