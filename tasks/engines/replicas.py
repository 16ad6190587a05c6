"""Several workers that do the shards of a step, each with the policy loaded: what they are in any engine.

A worker opens the step's inputs itself, and commits each shard as a part of an attempt of its own. The owner
of the step only tells it which shard comes next and hears that it is done; it reads the parts at the end.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import TracebackType
from typing import Any, Generic

from sera_core.artifacts.local_store import disk_full_error
from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.store import open_store, remove_workspace
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from tasks.engines.sampler import Finished
from tasks.engines.shard_queue import ShardQueue, Worker
from tasks.engines.shards import Shards

LOG = logging.getLogger("sera.replicas")
CHECK = -1
"""Number that stands for the check of the first shard."""


class Assignment(Generic[Worker]):
    """What the owner knows: which shards are done, who does which, how far all is."""

    def __init__(self, attempt: Attempt, shards: Shards, finished: Mapping[int, Any]) -> None:
        """No worker yet.

        Args:
            attempt: the step's.
            shards: all its shards; they are not done through this.
            finished: numbers of those that are done already.
        """
        self.attempt, self.sizes, self.unit = attempt, shards.sizes, shards.unit
        self._checked = shards.checked
        missing = [number for number in range(len(self.sizes)) if number not in finished]
        self.queue: ShardQueue[Worker] = ShardQueue(missing, shards.ahead)
        self._done = sum(self.sizes[number] for number in finished)
        self._under_way: dict[Worker, tuple[int, int]] = {}
        """The shard that each worker was told to do, and how much of it is done."""
        self._free: set[Worker] = set()
        """Workers that have finished a shard since the last `to_send`."""
        if self._checked == "early" and 0 in finished:
            self.queue.add(CHECK)
            self._checked = None
        self._add_last_check()

    @property
    def finished(self) -> bool:
        """Whether every shard is done, and checked."""
        return self.queue.finished

    def to_send(self) -> Iterator[tuple[Worker, int, list[int]]]:
        """What to tell workers now: the shard to do, and those that will come next."""
        self._free |= {worker for worker, _ in self.queue.assign(time.monotonic())}
        free, self._free = self._free, set()
        for worker in free:
            if worker not in self._under_way and (held := self.queue.held_by(worker)):
                self._under_way[worker] = (held[0], 0)
                yield worker, held[0], held[1:]

    def is_busy(self, worker: Worker) -> bool:
        """Whether a worker still does a shard, for the second time if all are done."""
        return worker in self._under_way

    def progress(self, worker: Worker, some: int) -> None:
        """A worker has done so much of its shard."""
        if worker in self._under_way:
            self._under_way[worker] = (self._under_way[worker][0], some)
            self._report()

    def did(self, worker: Worker, number: int, metrics: Mapping[str, Any]) -> None:
        """A worker has committed a shard, or made the check."""
        self._under_way.pop(worker, None)
        self._free.add(worker)
        if not self.queue.acknowledge(worker, number, time.monotonic()):
            return
        if number == CHECK:
            self.attempt.metrics |= metrics
            return
        self._done += self.sizes[number]
        if number == 0 and self._checked == "early":
            self.queue.add(CHECK)
            self._checked = None
        self._add_last_check()
        self._report()

    def lost(self, worker: Worker, how: str) -> None:
        """A worker is gone.

        Args:
            worker: whoever it was.
            how: its name and how it ended.

        Raises:
            ShardFailsError: too many were lost with the same shard under way.
        """
        self._under_way.pop(worker, None)
        again = [number for number in self.queue.lose(worker) if number != CHECK]
        taken = f"; others take its shard {again[0]}" if again else ""
        LOG.warning("step %s: %s%s", self.attempt.spec.step, how, taken)

    def _add_last_check(self) -> None:
        if self._checked == "at the end" and self.queue.finished:
            self.queue.add(CHECK)
            self._checked = None

    def _report(self) -> None:
        some = sum(some for number, some in self._under_way.values() if number != CHECK)
        self.attempt.progress(min(self._done + some, sum(self.sizes)), sum(self.sizes), self.unit)


class ShardWorker:
    """One worker: an attempt of its own, and the shards, which load the policy on first use."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        """Open the step's inputs.

        Args:
            request: store, spec, execution; opened_by: `module:function` (attempt) -> shards.
        """
        self.attempt = Attempt(
            open_store(request["store"], remember=True),
            StepSpec.model_validate(request["spec"]),
            ExecutionConfig.model_validate(request["execution"]),
        )
        module, name = request["opened_by"].split(":")
        self._open: Callable[[Attempt], Shards] = getattr(import_module(module), name)
        self._shards: Shards | None = None

    def __enter__(self) -> "ShardWorker":
        self.attempt.memory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.attempt.memory.__exit__(kind, error, trace)
        if self._shards is not None:
            with contextlib.suppress(Exception):  # it ends anyway, and so frees everything
                self._shards.close()
        if not self.attempt.committed:
            shutil.rmtree(self.attempt.folder, ignore_errors=True)
        remove_workspace(self.attempt.store, self.attempt.folder)

    def do(self, number: int, following: list[int], finished: Finished) -> dict[str, Any]:
        """Do a shard, or the check; returns what the check measured.

        Raises:
            SeraError: it cannot be done.
        """
        try:
            if self._shards is None:
                self._shards = self._open(self.attempt)
            if number != CHECK:
                self._shards.do(number, following, finished)
                return {}
            if self._shards.checked == "at the end":
                self._shards.close()
            self._shards.check()
            return self.attempt.metrics
        except SeraError:
            raise
        except Exception as error:
            if (trouble := disk_full_error(error, self.attempt.folder)) is None:
                raise
            raise trouble from error
