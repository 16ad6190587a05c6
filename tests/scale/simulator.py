"""A step of millions of rows on many workers, simulated: the real scheduler, all else drawn at random.

python -m tests.scale simulator

Discrete events drive `tasks.engines.shard_queue.ShardQueue`, the class that the owner of a step uses. There
are no engines, no store and no machines: a shard takes a time drawn around a stated mean, now and then a
multiple of it, and workers are lost at a stated rate and replaced. What comes out is a simulation, and is
called one; only `scheduler_s`, `owner_mib` and `metadata_mib` are measured, on the machine that simulates.
"""

import heapq
import json
import math
import random
import time
import tracemalloc
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from sera_core.artifacts.manifest import FileRecord
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.step import READERS
from tasks.engines.shard_queue import ShardQueue

PAIRS = 10_000_000
WORKERS = (8, 64, 1024)
COMMIT_WRITES = 2
"""Writes of a shard: its file, and its record (counted by `test_s3_store.py`)."""
PREFIX_WRITES_PER_S, PREFIX_READS_PER_S = 3500, 5500
"""What S3 promises for each prefix of a bucket (Amazon S3 User Guide, "Best practices design patterns")."""


@dataclass(frozen=True)
class Rates:
    """What is assumed of the machines; give measured values for a forecast of your own."""

    shard_s: float
    """Mean seconds of a shard."""
    spread: float = 0.2
    """Standard deviation of the logarithm of a shard's seconds."""
    straggling: float = 0.01
    """Share of the shards that take `slower` times as long."""
    slower: float = 5.0
    lost_per_hour: float = 0.01
    """Chance that a worker is lost in an hour."""
    replaced_s: float = 300.0
    """Seconds from the loss of a worker to its successor's first shard."""
    request_s: float = 0.03
    """Seconds of a small request to the store."""


SAMPLING = (64, Rates(shard_s=25.0))
SCORING = (128, Rates(shard_s=1.1))
"""Rows of a shard (`tasks.sampling`, `tasks.scoring`), and its assumed seconds: 4 responses of 256 tokens to
each prompt at 2,600 tokens a second, and 128 pairs of 1,000 tokens at 120,000."""


def run(pairs: int = PAIRS, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each step and number of workers."""
    return [
        {"step": step, "pairs": pairs, **simulate(-(-pairs // rows), workers, rates, seed)}
        for step, (rows, rates) in {"sample": SAMPLING, "logps": SCORING}.items()
        for workers in WORKERS
    ]


def simulate(shards: int, workers: int, rates: Rates, seed: int) -> dict[str, Any]:
    """One step on so many workers: seconds until its last shard, and until its files are merged."""
    world = _World(shards, workers, rates, random.Random(seed))
    world.play()
    return {
        "workers": workers,
        "shards": shards,
        "makespan_s": round(world.now, 3),
        "utilisation": round(world.useful / (workers * world.now), 3),
        "lost_workers": world.lost,
        "shards_repeated": world.repeated,
        "store_requests_per_s": world.peak_writes(),
        "merge_s": round(2 * -(-shards // READERS) * rates.request_s, 3),
        "merge_one_by_one_s": round(shards * rates.request_s, 3),
        "scheduler_s": round(world.scheduler_s, 2),
        "owner_mib": owner_mib(shards),
        "metadata_mib": round(shards * len(_part_record(0)) / 2**20, 1),
        "assumed": asdict(rates),
    }


@cache
def owner_mib(shards: int) -> float:
    """Memory of a queue and of the records of all parts, which the owner holds before it merges them."""
    tracemalloc.start()
    queue: ShardQueue[int] = ShardQueue(range(shards))
    records = {number: json.loads(_part_record(number)) for number in range(shards)}
    held = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    assert queue.missing == len(records)
    return round(held, 1)


def _part_record(number: int) -> str:
    """A part's record as `Attempt.commit_part` writes it."""
    file = FileRecord(attempt=f"{number:016x}", sha256=f"{number:064x}", bytes=10**5, rows=256)
    files = {f"part-{number:05d}.parquet": file.model_dump()}
    return json.dumps({"format": FORMAT, "files": files, "info": {"tokens": 128_000}})


class _World:
    """Workers that finish shards, are lost and come back, in order of time."""

    def __init__(self, shards: int, workers: int, rates: Rates, chance: random.Random) -> None:
        self.rates, self.chance = rates, chance
        self.queue: ShardQueue[int] = ShardQueue(range(shards))
        self.now = self.useful = self.scheduler_s = 0.0
        self.lost = self.repeated = 0
        self._events: list[tuple[float, int, str, int, int]] = []
        """(time, number, what, worker, shard)."""
        self._alive: set[int] = set()
        self._names = self._numbers = 0
        self._seconds: dict[int, float] = {}
        """Seconds of each shard under way."""
        self._writes: Counter[int] = Counter()
        self._wakes_at = math.inf
        for _ in range(workers):
            self._join()

    def play(self) -> None:
        """Until every shard is acknowledged."""
        self._assign()
        while not self.queue.finished:
            self.now, _, what, worker, shard = heapq.heappop(self._events)
            getattr(self, f"_{what}")(worker, shard)
            self._assign()

    def peak_writes(self) -> float:
        """Largest number of writes a second, over ten seconds."""
        return max(self._writes.values(), default=0) / 10

    def _finishes(self, worker: int, shard: int) -> None:
        if worker not in self._alive:
            return
        self._writes[int(self.now / 10)] += COMMIT_WRITES
        first = self._timed(self.queue.acknowledge, worker, shard, self.now)
        if first:
            self.useful += self._seconds.pop(shard)
        else:
            self.repeated += 1

    def _dies(self, worker: int, _: int) -> None:
        self._alive.discard(worker)
        self.lost += 1
        self.repeated += len(self._timed(self.queue.lose, worker))
        self._after(self.rates.replaced_s, "returns", -1, -1)

    def _returns(self, _: int, __: int) -> None:
        self._join()

    def _wakes(self, _: int, __: int) -> None:
        self._wakes_at = math.inf

    def _join(self) -> None:
        worker, self._names = self._names, self._names + 1
        self._alive.add(worker)
        self._timed(self.queue.join, worker)
        self._after(self.chance.expovariate(self.rates.lost_per_hour / 3600), "dies", worker, -1)

    def _assign(self) -> None:
        for worker, shard in self._timed(self.queue.assign, self.now):
            seconds = self._draw() + COMMIT_WRITES * self.rates.request_s
            self._seconds[shard] = seconds
            self._after(seconds, "finishes", worker, shard)
        wake = self.queue.straggles_at()
        if wake is not None and not self.queue.waiting and self.now < wake < self._wakes_at:
            self._wakes_at = wake
            self._after(wake - self.now, "wakes", -1, -1)

    def _draw(self) -> float:
        rates = self.rates
        seconds = rates.shard_s * self.chance.lognormvariate(-(rates.spread**2) / 2, rates.spread)
        return seconds * (rates.slower if self.chance.random() < rates.straggling else 1)

    def _after(self, seconds: float, what: str, worker: int, shard: int) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (self.now + seconds, self._numbers, what, worker, shard))

    def _timed(self, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        answer = call(*arguments)
        self.scheduler_s += time.perf_counter() - start
        return answer
