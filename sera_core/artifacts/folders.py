"""Local folders put together from files of the store: a policy from S3, an adapter beside its base."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def cache_folder() -> Path:
    """Where assembled folders live: $SERA_CACHE, else ~/.cache/sera-flow."""
    return Path(os.environ.get("SERA_CACHE", Path.home() / ".cache" / "sera-flow"))


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
