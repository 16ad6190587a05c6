"""Local folders assembled from files of the store: a policy from S3, an adapter beside its base."""

import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sera_core.artifacts.canonical import sha256_file, sha256_json
from sera_core.artifacts.recorded import entries
from sera_core.errors import InputError

LOG = logging.getLogger("sera.cache")


def cache_folder() -> Path:
    """The cache folder: $SERA_CACHE, else ~/.cache/sera-flow.

    If the home directory is not writable, as in many containers, a temporary folder is used.

    Raises:
        InputError: $SERA_CACHE is not writable.
    """
    if given := os.environ.get("SERA_CACHE"):
        return writable(Path(given), "SERA_CACHE")
    try:
        return writable(Path.home() / ".cache" / "sera-flow", "SERA_CACHE")
    except (InputError, RuntimeError) as error:  # RuntimeError: this user has no home
        folder = _temporary_cache()
        LOG.warning("%s; using %s as the cache for now", error, folder)
        os.environ["SERA_CACHE"] = str(folder)  # warn once; child processes use the same folder
        return folder


def writable(folder: Path, setting: str) -> Path:
    """Create the folder if needed, and check that it is writable.

    Raises:
        InputError: it is not; the message names `setting`, which sets the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot create this folder ({error.strerror}); set {setting} to a folder that can be "
            "written to"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: not writable; set {setting} to a writable folder")
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically (temporary file, then rename); links are not followed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_cache() -> Path:
    """A folder that only this user can enter, the same for all processes of the user."""
    folder = Path(tempfile.gettempdir()) / f"sera-flow-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError(f"{folder}: other users can access this folder; set SERA_CACHE to a private one")
    return folder


def assemble(name: str, files: Mapping[str, Path], texts: Mapping[str, str] | None = None) -> Path:
    """Create a cache folder with exactly these files (as links where possible) and texts, atomically.

    Args:
        name: prefix of the folder's name; the rest is a hash of the content.
        files: path in the folder -> source file.
        texts: path in the folder -> text to write there.
    """
    links, texts = {relative: source.absolute() for relative, source in files.items()}, texts or {}
    held = sha256_json([{relative: str(source) for relative, source in links.items()}, texts])
    target = cache_folder() / "folders" / f"{name}-{held[:16]}"
    if _holds_exactly(target, links, texts):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        made = Path(scratch) / "made"
        _fill(made, links, texts)
        if os.path.lexists(target):  # its content was changed
            LOG.warning("%s: unexpected content in this cached folder; creating it again", target)
            target.rename(Path(scratch) / "other")
        try:
            made.rename(target)
        except OSError:  # another process created it first
            if not _holds_exactly(target, links, texts):
                raise
    return target


def _holds_exactly(folder: Path, links: Mapping[str, Path], texts: Mapping[str, str]) -> bool:
    """Whether a cached folder holds only what `_fill` wrote: libraries read any extra file too."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    found = dict(entries(folder))
    if found.keys() != links.keys() | texts.keys():
        return False
    written = {name: (folder / name).read_text() for name in texts if not found[name]}
    return written == texts and all(_is_same(folder / name, source) for name, source in links.items())


def _is_same(file: Path, source: Path) -> bool:
    if file.is_symlink():
        return file.readlink() == source
    return sha256_file(file) == sha256_file(source)


def _fill(folder: Path, links: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    for name in [*links, *texts]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, source in links.items():
        try:
            (folder / name).symlink_to(source)
        except OSError:
            shutil.copyfile(source, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text)
