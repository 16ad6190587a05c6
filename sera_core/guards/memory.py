"""Memory of this machine or container, and of a step while it runs."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""Where the system shows an accelerator: without one, torch need not be imported."""
_uncounted: set[int] = set()
"""Processes whose memory their own children share, so that it would count twice."""
_CLOCK_SECONDS = 1.0
"""The start of a process counts from a boot time in whole seconds."""


def main_memory() -> tuple[float, float]:
    """Bytes of memory, total and available; a container's limit counts if there is one."""
    total = free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if _MEMINFO.exists():
        free = _values(_MEMINFO, ":")["MemAvailable"] * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        total = min(total, float(most))
        cached = _values(_CGROUP / "memory.stat", " ").get("inactive_file", 0.0)  # the kernel can reclaim it
        free = min(free, total - float(used.read_text()) + cached)
    return total, free


def accelerator_here(device: str) -> bool:
    """Whether steps compute on an accelerator here.

    Args:
        device: `execution.device`.
    """
    if device == "cpu" or not any(driver.exists() for driver in _DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def device_memory(device: str) -> tuple[int, int]:
    """Bytes of memory where steps compute, total and free: of the accelerator if there is one, else main.

    Args:
        device: `execution.device`.
    """
    if accelerator_here(device):
        import torch

        free, total = torch.cuda.mem_get_info()
        return total, free
    total, free = main_memory()
    return int(total), int(free)


def count_without(pid: int) -> None:
    """Leave a child process out of `used_memory`, but not its own children."""
    _uncounted.add(pid)


def count_again(pid: int) -> None:
    """Undo `count_without`: the process has ended, and another may get its number."""
    _uncounted.discard(pid)


def used_memory(since: float | None = None) -> int:
    """Bytes that this process holds in main memory, and torch on the accelerator.

    Args:
        since: count the children, too, that were started at this time (Unix seconds) or later. Finding them
            takes milliseconds, because all processes are read.
    """
    cuda = sys.modules.get("torch.cuda")
    started = getattr(cuda, "is_initialized", None)  # None also while another thread imports torch
    used = cuda.memory_reserved() if cuda is not None and started is not None and started() else 0
    own = psutil.Process()
    used += own.memory_info().rss
    if since is None:
        return used
    for child in own.children(recursive=True):
        if child.pid in _uncounted:
            continue
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            used += child.memory_info().rss if child.create_time() >= since - _CLOCK_SECONDS else 0
    return used


class MemoryWatch:
    """Measures memory while its block runs, and calls `warn` once if it grows by more than planned.

    A block that is shorter than the time between two measurements is measured without its children.

    Args:
        warn: called with (bytes by which memory grew, planned bytes).
        seconds: time between two measurements.
    """

    def __init__(self, warn: Callable[[int, int], None], seconds: float = 0.5) -> None:
        self.planned: int | None = None
        """Bytes by which memory may grow; None: no plan."""
        self.grown = 0
        """Bytes by which memory grew at most so far."""
        self._warn, self._seconds = warn, seconds
        self._start, self._since, self._ended = 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, name="sera-memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._start, self._since = used_memory(), time.time()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        warned = False
        while True:
            last = self._ended.wait(self._seconds)
            self.grown = max(self.grown, used_memory(None if last else self._since) - self._start)
            if self.planned is not None and self.grown > self.planned and not warned:
                warned = True
                self._warn(self.grown, self.planned)
            if last:
                return


def _values(file: Path, separator: str) -> dict[str, float]:
    """The first number of each line, by the text before the separator."""
    lines = (line.split(separator, 1) for line in file.read_text().splitlines()) if file.exists() else ()
    return {name: float(value.split()[0]) for name, value in lines}
