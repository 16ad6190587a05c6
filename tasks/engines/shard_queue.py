"""Which worker does which shard of a step next: no processes, no clock and no store in here.

The owner of a step tells the queue what happened (`join`, `acknowledge`, `lose`) and sends what `assign`
answers. Workers and times are the caller's: any hashable, and seconds of any clock. Every call takes O(log n)
in the number of shards, `assign` besides one step for each shard that it gives out.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

from sera_core.errors import SeraError

FAILURES = 3
"""Workers that may be lost with the same shard under way; then the shard is held to be the cause."""
STRAGGLING = 3.0
"""A shard under way for this many times the mean duration is also given to an idle worker,"""
STRAGGLING_SECONDS = 30.0
"""but not before so many seconds."""


Worker = TypeVar("Worker", bound=Hashable)


class ShardFailsError(SeraError):
    """Too many workers were lost with the same shard under way."""


class ShardQueue(Generic[Worker]):
    """The shards of a step that are not finished, and the workers that do them.

    The lowest waiting shard goes to the worker that has been idle longest. A lost worker's shards wait again.
    When none waits, a shard that takes much longer than the others is given to a second worker; the record of
    whoever is first counts. The caller's loop:

        for worker, shard in queue.assign(now):
            …send it, and wait for the next event or `straggles_at`: queue.acknowledge or queue.lose…
    """

    def __init__(self, missing: Iterable[int], ahead: int = 1, failures: int = FAILURES) -> None:
        """A queue without workers.

        Args:
            missing: numbers of the shards that have no record yet.
            ahead: shards that a worker holds at once, at least 1: the one under way and those after it.
            failures: workers that may be lost with the same shard under way, at least 1.
        """
        self._missing = set(missing)
        self._waiting = sorted(self._missing)  # a sorted list is a heap
        """Shards that no worker holds; also some that are finished, which are skipped."""
        self._ahead, self._failures = ahead, failures
        self._held: dict[Worker, OrderedDict[int, float]] = {}
        """Shards of each worker by time of assignment; the first is under way."""
        self._room: list[deque[Worker]] = [deque() for _ in range(ahead)]
        """Workers that hold so many shards; also some that no longer do, which are skipped."""
        self._holders: dict[int, set[Worker]] = {}
        self._alone: OrderedDict[int, float] = OrderedDict()
        """Shards with one worker by time of assignment, oldest first."""
        self._lost: dict[int, int] = {}
        """Workers lost with a shard under way."""
        self._seconds, self._measured = 0.0, 0

    # ------------------------------------------------------------------------------------------ what is known

    @property
    def finished(self) -> bool:
        """Whether every shard is acknowledged; workers may still do some for the second time."""
        return not self._missing

    @property
    def missing(self) -> int:
        """Number of shards that are not acknowledged."""
        return len(self._missing)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """Number of shards that no worker holds."""
        return len(self._missing) - len(self._holders)

    def held_by(self, worker: Worker) -> list[int]:
        """The shards of a worker, the one under way first; none if it is not a worker."""
        return list(self._held.get(worker, ()))

    # --------------------------------------------------------------------------------------- what happens

    def join(self, worker: Worker) -> None:
        """A new worker is ready, or will be soon: shards may be sent to it."""
        self._held[worker] = OrderedDict()
        self._room[0].append(worker)

    def add(self, shard: int) -> None:
        """A further shard is to be done; it was not among those of the beginning."""
        self._missing.add(shard)
        heapq.heappush(self._waiting, shard)

    def acknowledge(self, worker: Worker, shard: int, now: float) -> bool:
        """A worker has committed a shard; returns whether nobody else had.

        Args:
            worker: whoever says so; it may have been taken for lost meanwhile.
            shard: one that it was given.
            now: the time, in the clock of `assign`, in seconds.
        """
        since = self._release(worker, shard)
        if shard not in self._missing:
            return False
        self._missing.remove(shard)
        self._holders.pop(shard, None)
        self._alone.pop(shard, None)
        if since is not None:
            self._seconds, self._measured = self._seconds + (now - since), self._measured + 1
        return True

    def lose(self, worker: Worker) -> list[int]:
        """A worker is gone; returns the shards that wait again because of it.

        Raises:
            ShardFailsError: too many workers were lost with the same shard under way.
        """
        held = list(self._held.pop(worker, ()))
        unfinished = [shard for shard in held if shard in self._missing]
        again = []
        for shard in unfinished:
            holders = self._holders[shard]
            holders.discard(worker)
            for other in holders:  # there is one at most
                self._alone[shard] = self._held[other][shard]
                self._alone.move_to_end(shard, last=False)
            if not holders:
                del self._holders[shard]
                self._alone.pop(shard, None)
                heapq.heappush(self._waiting, shard)
                again.append(shard)
        if unfinished and unfinished[0] == held[0]:
            self._blame(held[0])
        return again

    def assign(self, now: float) -> list[tuple[Worker, int]]:
        """Give waiting shards to workers that have room: what is to be sent, as (worker, shard).

        Args:
            now: the time, in seconds.
        """
        return [*self._first_time(now), *self._second_time(now)]

    def straggles_at(self) -> float | None:
        """When the oldest shard with one worker will count as a straggler; None while nothing is measured."""
        if not self._alone or not self._measured:
            return None
        patience = max(STRAGGLING * self._seconds / self._measured, STRAGGLING_SECONDS)
        return next(iter(self._alone.values())) + patience

    # ------------------------------------------------------------------------------------------------ inside

    def _first_time(self, now: float) -> Iterator[tuple[Worker, int]]:
        while self.waiting and (worker := self._most_idle()) is not None:
            shard = self._lowest()
            self._give(worker, shard, now)
            self._alone[shard] = now
            yield worker, shard

    def _second_time(self, now: float) -> Iterator[tuple[Worker, int]]:
        while not self.waiting and (shard := self._straggler(now)) is not None:
            if (worker := self._most_idle(levels=1)) is None:
                return
            del self._alone[shard]
            self._give(worker, shard, now)
            yield worker, shard

    def _give(self, worker: Worker, shard: int, now: float) -> None:
        held = self._held[worker]
        held[shard] = now
        self._holders.setdefault(shard, set()).add(worker)
        if len(held) < self._ahead:
            self._room[len(held)].append(worker)

    def _release(self, worker: Worker, shard: int) -> float | None:
        """Take a shard off a worker; returns when it got it, or None if it does not hold it."""
        held = self._held.get(worker)
        if held is None or shard not in held:
            return None
        since = held.pop(shard)
        self._room[len(held)].append(worker)
        return since

    def _lowest(self) -> int:
        """The lowest shard that waits."""
        while (shard := heapq.heappop(self._waiting)) not in self._missing or shard in self._holders:
            pass
        return shard

    def _most_idle(self, levels: int | None = None) -> Worker | None:
        """The worker that holds fewest shards, for longest, and has room; None: all are full."""
        for count, workers in enumerate(self._room[:levels]):
            while workers:
                worker = workers.popleft()
                if worker in self._held and len(self._held[worker]) == count:
                    return worker
        return None

    def _straggler(self, now: float) -> int | None:
        since = self.straggles_at()
        return next(iter(self._alone)) if since is not None and now >= since else None

    def _blame(self, shard: int) -> None:
        self._lost[shard] = self._lost.get(shard, 0) + 1
        if self._lost[shard] >= self._failures:
            raise ShardFailsError(
                f"shard {shard}: {self._lost[shard]} workers were lost while they did it, so it is not tried "
                "again; their output says how they ended, and too little memory is the usual cause"
            )
