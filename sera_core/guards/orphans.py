"""No process outlives the one it works for, however that one ends."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """End this process when its parent ends: told by the kernel (Linux), or by a watching thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def guarded_group() -> Iterator[None]:
    """While the block runs, a small process stands by that kills our process group when we end.

    A killed process takes nobody along: the death signal reaches its own children only if they asked for it,
    and a watching thread dies with it, or starves while a library holds the interpreter. To be entered by a
    group's leader before it has threads: it forks.
    """
    leader = os.getpid()
    assert os.getpgrp() == leader, "the group is somebody else's: start this process in a session of its own"
    guard = os.fork()
    if guard == 0:
        _stand_guard(leader)
    try:
        yield
    finally:
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)


def _stand_guard(leader: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whoever reads the leader's pipes waits for the leader alone
        os.dup2(null, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    while os.getppid() == leader:
        time.sleep(0.2)
    os.killpg(leader, signal.SIGKILL)  # this process included
