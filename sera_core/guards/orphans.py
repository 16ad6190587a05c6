"""Child processes end with their parent, even if it is killed."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def exit_with_parent(parent: int) -> None:
    """End this process when its parent ends: by a kernel signal (Linux) and a watching thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def guarded_group() -> Iterator[None]:
    """Run a small guard process that kills our process group if this process ends inside the block.

    Killing a process does not kill its children: they must ask for the death signal, and a watching thread
    dies with the process, or cannot run while a library holds the interpreter. Call it from the group's
    leader before it starts threads, because it forks.
    """
    leader = os.getpid()
    assert os.getpgrp() == leader, "not a group leader: start this process in its own session"
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
    for stream in (0, 1, 2):  # so that readers of the leader's pipes do not wait for this process
        os.dup2(null, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    while os.getppid() == leader:
        time.sleep(0.2)
    os.killpg(leader, signal.SIGKILL)  # including this process
