"""Local folders of this process for files on their way to or from a remote store."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

from sera_core.artifacts.folders import cache_folder


def scratch_folder() -> Path:
    """A fresh folder below the cache. Those of processes of this machine that are gone are removed first."""
    home, host = cache_folder() / "work", socket.gethostname()
    home.mkdir(parents=True, exist_ok=True)
    for left in home.glob(f"{host}-*-*"):
        process = left.name.removeprefix(f"{host}-").split("-")[0]
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{host}-{os.getpid()}-", dir=home))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
