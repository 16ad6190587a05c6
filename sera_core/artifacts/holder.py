"""The process that holds a lease, and whether it is still alive.

A process is identified by pid, start time, and boot id with process namespace, because pids are reused.
"""

import getpass
import os
import secrets
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

from sera_core.artifacts.records import StrictModel


class Holder(StrictModel):
    """A process that holds a lease."""

    token: str
    """Random per lease, so that a holder can recognise its own record."""
    host: str
    user: str
    pid: int
    began: str
    """Start time of the process, in its machine's clock ticks."""
    place: str
    """Boot id and process namespace: within one, pid and start time identify a process."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}"


def this_process() -> Holder:
    """The current process, with a new token each time."""
    pid = os.getpid()
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        user=_user(),
        pid=pid,
        began=_began(pid) or "",
        place=_place(),
    )


def is_alive(holder: Holder) -> bool | None:
    """Whether the process is alive; None if it belongs to another machine or namespace."""
    if holder.place != _place():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, but belongs to another user
        pass
    began = _began(holder.pid)
    return None if began is None else began == holder.began


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without a name
        return str(os.getuid())


@cache
def _place() -> str:
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _began(pid: int) -> str | None:
    """Start time of a process; `over` for a zombie, None if it cannot be read."""
    if sys.platform != "linux":
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return done.stdout.strip() or None
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = text.rsplit(")", 1)[1].split()
    return "over" if state in "ZX" else rest[18]
