"""How much faster two workers of one thread are than one, and what handing a shard to a worker costs.

The start of the processes and the loading of the policy are left out: they take the same with any number of
shards.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycluster import cluster
from sharded import CPU, Sharded
from smallshards import number_shards

from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import Progress, run_step
from sera_core.config import ExecutionConfig

SHARDS = 12
TURNS = 4
ONE_WORKER = CPU.model_copy(update={"distribute": "processes", "replicas": 1})
TWO_WORKERS = ONE_WORKER.model_copy(update={"replicas": 2})


def run() -> dict[str, float]:
    """Ratio of the times of sampling and of scoring; a shard's overhead in milliseconds."""
    with tempfile.TemporaryDirectory(prefix="sera-speedup-") as folder:
        return {
            "sampling": _speedup(Path(folder), "sample"),
            "scoring": _speedup(Path(folder), "logps"),
            **_overheads(Path(folder)),
        }


def _speedup(folder: Path, step: str) -> float:
    """Two processes against one: there too a process of its own does the shards."""
    one, two = (
        Sharded(folder / f"{step}-{replicas}", SHARDS, responses=4, tokens=16, layers=4, hidden=128)
        for replicas in (1, 2)
    )
    rate = _rate(lambda progress: one.run(getattr(one, step), ONE_WORKER, progress))
    return round(_rate(lambda progress: two.run(getattr(two, step), TWO_WORKERS, progress)) / rate, 2)


def _overheads(folder: Path) -> dict[str, float]:
    """Milliseconds that a shard takes longer in one worker than in the owner itself, with the same work.

    `shard_overhead_ms`: in a process of this machine; `shard_overhead_ray_ms`: on a Ray cluster. The shards
    write a small file and nothing else, so that the work does not hide what is measured.
    """
    world = Sharded(folder / "small", 1, layers=1, hidden=32)
    alone, process = _shard_ms(world, CPU), _shard_ms(world, ONE_WORKER)
    with _ray_worker() as on_ray:
        ray = _shard_ms(world, on_ray)
    return {
        "shard_overhead_ms": round(process - alone, 1),
        "shard_overhead_ray_ms": round(ray - alone, 1),
    }


@contextmanager
def _ray_worker() -> Iterator[ExecutionConfig]:
    """The settings of one worker on a cluster, which this process leaves at the end."""
    import ray

    with cluster(1) as nodes:
        yield CPU.model_copy(update={"distribute": "ray", "replicas": 1, "address": nodes.address})
        ray.shutdown()


def _shard_ms(world: Sharded, execution: ExecutionConfig) -> float:
    """Milliseconds of a shard, in the fastest of some turns: other work on the machine only adds to them."""
    inputs = {"policy": world.model, "model": world.model}

    def turn(number: int) -> float:
        fields = {"turn": number, "distribute": execution.distribute}
        spec = StepSpec(step="logps", version=1, fields=fields, inputs=inputs)
        return _rate(lambda progress: run_step(world.store, spec, number_shards, execution, progress))

    return 1000 / max(map(turn, range(TURNS)))


def _rate(work: Callable[[Progress], object]) -> float:
    """Responses or shards a second once every worker works: from the first quarter of them to nine tenths."""
    seen: list[tuple[float, int]] = []

    def progress(done: int, *_: Any) -> None:
        seen.append((time.monotonic(), done))

    work(progress)
    total = seen[-1][1]
    start = next((at, done) for at, done in seen if done >= total / 4)
    end = next((at, done) for at, done in seen if done >= total * 0.9)
    return (end[1] - start[1]) / (end[0] - start[0])
