"""Temporary local folders of this process for uploads to and downloads from a remote store."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

from sera_core.artifacts.folders import cache_folder


def scratch_folder() -> Path:
    """A new folder below the cache. Folders of processes that no longer exist are removed first."""
    home = cache_folder() / "work"
    home.mkdir(parents=True, exist_ok=True)
    ours = f"{socket.gethostname()}-{_process_namespace()}-"  # a pid is unique within this prefix
    for left in home.glob(f"{ours}*-*"):
        process = left.name.removeprefix(ours).split("-")[0]
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{ours}{os.getpid()}-", dir=home))


def _process_namespace() -> int:
    """Id of the pid namespace: containers can share a host name and a cache but have separate pids."""
    namespace = Path("/proc/self/ns/pid")
    return namespace.stat().st_ino if namespace.exists() else 0


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True
