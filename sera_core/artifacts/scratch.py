"""Local folders of this process for files on their way to or from a remote store."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

from sera_core.artifacts.folders import cache_folder


def scratch_folder() -> Path:
    """A fresh folder below the cache. Those of processes that are gone are removed first."""
    home = cache_folder() / "work"
    home.mkdir(parents=True, exist_ok=True)
    ours = f"{socket.gethostname()}-{_process_namespace()}-"  # within which a number means one process
    for left in home.glob(f"{ours}*-*"):
        process = left.name.removeprefix(ours).split("-")[0]
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{ours}{os.getpid()}-", dir=home))


def _process_namespace() -> int:
    """Containers may share a host's name and a cache, and still number their processes apart."""
    namespace = Path("/proc/self/ns/pid")
    return namespace.stat().st_ino if namespace.exists() else 0


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
