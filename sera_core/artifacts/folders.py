"""Local folders put together from files of the store: a policy from S3, an adapter beside its base."""

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sera_core.errors import InputError

LOG = logging.getLogger("sera.cache")


def cache_folder() -> Path:
    """Where assembled folders live: $SERA_CACHE, else ~/.cache/sera-flow.

    Where nothing can be written in the home directory, as in many containers, it is a temporary folder.

    Raises:
        InputError: nothing can be written to $SERA_CACHE.
    """
    if given := os.environ.get("SERA_CACHE"):
        return writable(Path(given), "SERA_CACHE")
    try:
        return writable(Path.home() / ".cache" / "sera-flow", "SERA_CACHE")
    except (InputError, RuntimeError) as error:  # RuntimeError: this user has no home
        folder = _temporary_cache()
        LOG.warning("%s; until then the cache is %s", error, folder)
        os.environ["SERA_CACHE"] = str(folder)  # said once, and the same in child processes
        return folder


def writable(folder: Path, setting: str) -> Path:
    """The folder, made if need be.

    Raises:
        InputError: nothing can be written there; the message names the setting that moves it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: this folder cannot be made ({error.strerror}); set {setting} to a folder that can be "
            "written to"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: nothing can be written here; set {setting} to a folder that can be")
    return folder


def _temporary_cache() -> Path:
    """A folder that only this user can enter, the same for all processes of the user."""
    folder = Path(tempfile.gettempdir()) / f"sera-flow-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError(f"{folder}: this is not a folder of yours alone; set SERA_CACHE to one that is")
    return folder


def assemble(name: str, files: Mapping[str, Path]) -> Path:
    """A folder `name` in the cache that holds the files (links where possible), made in one move."""
    target = cache_folder() / "folders" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
    for relative, source in files.items():
        destination = temporary / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            destination.symlink_to(source.absolute())
        except OSError:
            shutil.copyfile(source, destination)
    try:
        temporary.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
    return target
