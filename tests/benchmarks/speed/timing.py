"""Time something, after a warm-up: the median of a few repeats."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_seconds(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """(median seconds, last result)."""
    seconds, found = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def peak_gflops(dtype: str, size: int = 1024) -> float:
    """Speed of a matrix product of this size in GFLOP/s, the best of many."""
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + 3
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
