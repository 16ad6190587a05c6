"""Check output paths before any work starts; links are never written through."""

import os
import tempfile
from pathlib import Path

from sera_core.errors import InputError


def check_place(path: Path) -> None:
    """Refuse a path that cannot be created.

    Raises:
        InputError: its nearest existing parent is not a folder, or is not writable; the message names it.
    """
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        kind = "a broken link" if folder.is_symlink() and not folder.exists() else "a file"
        raise InputError(f"{path}: {folder} is {kind}, not a folder; give another path")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{path}: cannot write to {folder} ({error.strerror}); give another path, or change "
            "its permissions"
        ) from error


def check_new(flag: str, path: Path) -> None:
    """Refuse an output folder that exists (even as a broken link) or cannot be created.

    Raises:
        InputError: in both cases; the message names the flag.
    """
    if os.path.lexists(path):
        raise InputError(f"{flag} {path}: already exists; name a new folder")
    check_place(path)
