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
        start = now()
        found = work()
        seconds.append(now() - start)
    return statistics.median(seconds), found


def now() -> float:
    """Seconds of a clock, once the device has done all it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gflops(dtype: str, device: str = "cpu", seconds: float = 3.0) -> float:
    """Speed of a large matrix product in GFLOP/s, the best of many.

    The second matrix is transposed, as a linear layer's weight: on a CPU without bfloat16 instructions the
    plain product of two bfloat16 matrices is ten times slower than that.
    """
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best, until = float("inf"), now() + seconds
    while now() < until:
        start = now()
        a @ b.t()
        best = min(best, now() - start)
    return 2 * size**3 / best / 1e9
