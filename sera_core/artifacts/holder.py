"""Who holds a lease: a process of a machine, and whether it still lives, as far as can be told from here.

A process is known by its number, the time it began and the boot and process namespace it belongs to: the
number alone may have been given to another one since.
"""

import getpass
import os
import secrets
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

from sera_core.artifacts.records import Noun


class Holder(Noun):
    """A process that holds something."""

    token: str
    """Its own in every lease, so that a holder knows its record from another's."""
    host: str
    user: str
    pid: int
    began: str
    """When the process began, as its machine counts."""
    place: str
    """Boot and process namespace: within one, a number and a beginning mean one process."""

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}"


def this_process() -> Holder:
    """Ourselves, with a token of its own each time."""
    pid = os.getpid()
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        user=_user(),
        pid=pid,
        began=_began(pid) or "",
        place=_place(),
    )


def lives(holder: Holder) -> bool | None:
    """Whether the process is there; None where that cannot be told from here."""
    if holder.place != _place():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, so there is one
        pass
    began = _began(holder.pid)
    return None if began is None else began == holder.began


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return str(os.getuid())


@cache
def _place() -> str:
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _began(pid: int) -> str | None:
    """When a process began; `over` for one that only waits to be reaped, None where it is hidden from us."""
    if sys.platform != "linux":
        told = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return told.stdout.strip() or None
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = text.rsplit(")", 1)[1].split()
    return "over" if state in "ZX" else rest[18]
