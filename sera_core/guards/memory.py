"""Memory of this machine or container."""

import os
from pathlib import Path

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


def _values(file: Path, separator: str) -> dict[str, float]:
    """The first number of each line, by the text before the separator."""
    lines = (line.split(separator, 1) for line in file.read_text().splitlines()) if file.exists() else ()
    return {name: float(value.split()[0]) for name, value in lines}
