"""Selection and pairing of ten million synthetic pairs, in a process whose peak memory is its own."""

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

RESPONSES = 8


def selection(pairs: int) -> dict[str, Any]:
    """Seconds of both, and the process's peak memory in MiB."""
    command = [sys.executable, "-m", "tests.benchmarks.speed.selection", str(pairs)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _selected(pairs: int) -> dict[str, Any]:
    from sera_core.method.pairing import pair_responses
    from sera_core.method.selection import select

    draw = np.random.default_rng(0)
    margins = draw.normal(1, 2, pairs).round(6)
    ids = np.array([f"{number:016x}" for number in range(pairs)])
    start = time.perf_counter()
    select(margins, ids, rule="top-fraction", fraction=0.7, min_margin=0.0, seed=0)
    selected = time.perf_counter() - start
    del margins, ids
    prompts = pairs // RESPONSES
    index = np.repeat(np.arange(prompts), RESPONSES)
    sample = np.tile(np.arange(RESPONSES), prompts)
    rewards = draw.normal(size=index.size).round(6)
    start = time.perf_counter()
    pair_responses(rewards, index, sample, sample, np.ones(index.size, dtype=bool), rule="best-worst")
    paired = time.perf_counter() - start
    with open("/proc/self/status") as status:  # noqa: PTH123
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "seconds": round(selected + paired, 2),
        "select_seconds": round(selected, 2),
        "pair_seconds": round(paired, 2),
        "peak_mib": round(peak / 1024),
        "pairs": pairs,
    }


if __name__ == "__main__":
    print(json.dumps(_selected(int(sys.argv[1]))))
