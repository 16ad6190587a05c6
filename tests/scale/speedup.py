"""How much faster two workers of one thread sample and score than one: the policies are loaded in both."""

import tempfile
import time
from pathlib import Path
from typing import Any

from sharded import CPU, Sharded

SHARDS = 12


def run() -> dict[str, float]:
    """Ratio of the times of sampling and of scoring, from the first finished shard to the last.

    The start of the processes and the loading of the policy are left out: they take the same with any number
    of shards. With w workers, w shards are done or under way when the first is finished.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="sera-speedup-") as folder:
        for step in ("sample", "logps"):
            rates = []
            for replicas in (1, 2):
                world = Sharded(
                    Path(folder) / f"{step}-{replicas}", SHARDS, responses=4, tokens=16, layers=4, hidden=128
                )
                rates.append(_rate(world, step, replicas))
            found["sampling" if step == "sample" else "scoring"] = round(rates[1] / rates[0], 2)
    return found


def _rate(world: Sharded, step: str, replicas: int) -> float:
    """Responses a second once every worker works."""
    seen: list[tuple[float, int]] = []
    execution = CPU.model_copy(update={"distribute": "processes", "replicas": replicas})

    def progress(done: int, *_: Any) -> None:
        seen.append((time.monotonic(), done))

    world.run(getattr(world, step), execution, progress)
    total = seen[-1][1]
    start = next((at, done) for at, done in seen if done >= total / 4)
    end = next((at, done) for at, done in seen if done >= total * 0.9)
    return (end[1] - start[1]) / (end[0] - start[0])
