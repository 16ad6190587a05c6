"""Memory of this machine or container, and of a step while it runs."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


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


def free_memory(needed: int) -> int:
    """Bytes that steps can get: main memory and, if that is less than needed, the accelerator's too."""
    free = int(main_memory()[1])
    if free < needed:
        import torch

        free += torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return free


def used_memory() -> int:
    """Bytes that this process and its children hold in main memory, and torch on the accelerator."""
    torch = sys.modules.get("torch")
    used = torch.cuda.memory_reserved() if torch is not None and torch.cuda.is_initialized() else 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            used += process.memory_info().rss
    return used


class MemoryWatch:
    """Measures memory while its block runs, and calls `warn` once if it grows by more than planned.

    Args:
        warn: called with (bytes by which memory grew, planned bytes).
        used: bytes of memory held now.
        seconds: time between two measurements.
    """

    def __init__(
        self, warn: Callable[[int, int], None], used: Callable[[], int] = used_memory, seconds: float = 0.5
    ) -> None:
        self.planned: int | None = None
        """Bytes by which memory may grow; None: no plan."""
        self.grown = 0
        """Bytes by which memory grew at most so far."""
        self._warn, self._used, self._seconds = warn, used, seconds
        self._start, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, name="sera-memory", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._start = self._used()
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
            self.grown = max(self.grown, self._used() - self._start)
            if self.planned is not None and self.grown > self.planned and not warned:
                warned = True
                self._warn(self.grown, self.planned)
            if last:
                return


def _values(file: Path, separator: str) -> dict[str, float]:
    """The first number of each line, by the text before the separator."""
    lines = (line.split(separator, 1) for line in file.read_text().splitlines()) if file.exists() else ()
    return {name: float(value.split()[0]) for name, value in lines}
