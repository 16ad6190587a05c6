"""Ends what runs too long in this process, in whatever thread, as a template that loops does.

Counted is the processor's time of the thread (where the system tells it), so that neither a busy machine nor
a process that was stopped for a while ends anything. Python code alone can be ended, no call into C.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_POLL_SECONDS = 0.2
_IDLE_POLLS = 10


class TooLongError(Exception):
    """Raised inside the code that ran too long."""


@dataclass
class _Watched:
    """One thread's work: when its clock stands at `deadline`, it is ended."""

    clock: Callable[[], float]
    deadline: float
    ended: bool = False


_watched: dict[int, _Watched] = {}
_lock = threading.Lock()
_watchdog: threading.Thread | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Run the body for at most so many seconds; limits of one thread do not nest.

    Raises:
        TooLongError: from within the body, which took longer.
    """
    thread = threading.get_ident()
    clock = _clock_of(thread)
    work = _Watched(clock, clock() + seconds)
    with _lock:
        _watched[thread] = work
        _keep_watching()
    try:
        yield
    finally:
        with _lock:
            del _watched[thread]
            if work.ended:  # on its way, or raised already: it must not come after the body
                _raise_in(thread, None)


def _clock_of(thread: int) -> Callable[[], float]:
    """The thread's own time; macOS does not tell it, so there it is everybody's."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


def _keep_watching() -> None:
    """Start the watchdog where none is; it does not live through a fork."""
    global _watchdog
    if _watchdog is None or not _watchdog.is_alive():
        _watchdog = threading.Thread(target=_watch, name="sera-time-limit", daemon=True)
        _watchdog.start()


def _watch() -> None:
    global _watchdog
    idle = 0
    while True:
        time.sleep(_POLL_SECONDS)
        with _lock:
            idle = 0 if _watched else idle + 1
            if idle > _IDLE_POLLS:
                _watchdog = None
                return
            for thread, work in _watched.items():
                if not work.ended and work.clock() > work.deadline:
                    work.ended = True
                    _raise_in(thread, TooLongError)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Have a thread raise an error at its next step in Python; None takes back what it has not raised yet."""
    target = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), target)
