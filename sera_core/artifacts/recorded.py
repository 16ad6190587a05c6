"""Check that a folder of the store contains only recorded files.

Libraries read every file in a folder: an extra `added_tokens.json` beside a recorded policy changes that
policy. Other people may write to a store, so a folder with an unrecorded file or a link is refused.
"""

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from sera_core.artifacts.checks import check_hash, missing_error
from sera_core.errors import StoreError

_CHUNK = 8 * 2**20


def entries(folder: Path, under: str = "") -> Iterator[tuple[str, bool]]:
    """Relative path of every file and link below a folder, and whether it is a link; links are not followed.

    Raises:
        StoreError: a folder cannot be listed.
    """
    try:
        with os.scandir(folder) as listed:
            found = sorted(listed, key=lambda entry: entry.name)
    except FileNotFoundError:  # removed meanwhile
        return
    except PermissionError as error:
        raise StoreError(f"{folder}: cannot list this folder ({error}); make it readable") from error
    for entry in found:
        name = f"{under}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from entries(Path(entry.path), f"{name}/")
        else:
            yield name, entry.is_symlink()


def refuse_unrecorded(folder: Path, recorded: Collection[str]) -> None:
    """Refuse a folder that contains a link or an unrecorded file.

    Args:
        folder: a folder of a local store.
        recorded: paths of the recorded files, relative to the folder.

    Raises:
        StoreError: it does; the message names the first one.
    """
    for name, is_link in entries(folder):
        if is_link or name not in recorded:
            raise unrecorded_error(folder / name, is_link)


def unrecorded_error(where: object, is_link: bool) -> StoreError:
    """The error for a file or link in a step's folder that the step did not write."""
    if is_link:
        return StoreError(
            f"{where}: this is a link, but steps write only files. Remove it, or replace it with the file"
        )
    return StoreError(
        f"{where}: no record names this file, but loading a model from its folder could read it. Remove it"
    )


def copy_recorded(source: Path, target: Path, sha256: str) -> None:
    """Copy a recorded file and check the bytes as they are copied.

    Raises:
        StoreError: it is missing, a link, or does not match its hash.
    """
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise missing_error(source) from None
    except OSError as error:
        if source.is_symlink():
            raise unrecorded_error(source, is_link=True) from error
        raise
    with os.fdopen(handle, "rb") as stream, target.open("xb") as out:
        while data := stream.read(_CHUNK):
            digest.update(data)
            out.write(data)
    check_hash(source, digest.hexdigest(), sha256)
