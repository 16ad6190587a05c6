"""A step of many shards without work: each writes a file of one number. What is left is what shards cost."""

from collections.abc import Sequence
from typing import Any

from sera_core.artifacts.step import Attempt
from tasks.engines.child_step import Channel
from tasks.engines.finish_shards import finish_shards
from tasks.engines.replica_processes import serve
from tasks.engines.sampler import Finished

SHARDS = 400


def number_shards(attempt: Attempt) -> list[str]:
    """Write numbers.txt, a line for each shard."""
    parts = finish_shards(attempt, open_work(attempt), f"{__name__}:open_work")
    lines = [path.read_text() for path in attempt.part_paths(parts)]
    attempt.write("numbers.txt").write_text("".join(lines))
    return ["numbers.txt"]


def open_work(attempt: Attempt) -> "_Work":
    """The shards, for the owner or for a worker."""
    return _Work(attempt)


def do_as_replica(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Do shards as one of several processes."""
    return serve(request, channel)


class _Work:
    """See `tasks.engines.shards.Shards`."""

    unit, checked, ahead = "shards", None, 1

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.sizes = attempt, [1] * SHARDS

    def do(self, number: int, following: Sequence[int], finished: Finished) -> None:
        """Write the number."""
        name = f"part-{number:05d}.txt"
        self.attempt.write(name).write_text(f"{number}\n")
        self.attempt.commit_part(number, [name], {})
        finished(1)

    def check(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """Nothing is open."""
