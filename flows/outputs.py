"""Places that commands write to: checked before any work, and nothing is ever written through a link."""

import os
import tempfile
from pathlib import Path

from sera_core.errors import InputError


def check_place(path: Path) -> None:
    """Refuse a place where no file and no folder can be made.

    Raises:
        InputError: what it would lie in is no folder, or cannot be written to; the message names it.
    """
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        kind = "a link to nothing" if folder.is_symlink() and not folder.exists() else "a file"
        raise InputError(f"{path}: {folder} is {kind}, not a folder; name another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: nothing can be written to {folder} ({error.strerror}); name another place, or change "
            "its permissions"
        ) from error


def check_new(flag: str, path: Path) -> None:
    """Refuse a folder to make that exists, be it as a link to nothing, or that cannot be made.

    Raises:
        InputError: either; the message names the flag.
    """
    if os.path.lexists(path):
        raise InputError(f"{flag} {path}: exists already; name a folder that does not")
    check_place(path)
