"""Train a round in several processes of this machine: start them, answer them, end them all.

The processes are forked from the server that forks every step's process (`fork_server`), not launched by
`torch.distributed.run`: its agent would be one more process between them and their owner, would import torch
and TRL again for each, and restarts what should fail at once. Here they start in a fraction of a second, need
no port (they meet through a file), and end with their owner, also if it is killed.

The owner does no work of the step, so that no process of it can be stuck: it alone has the store's attempt,
and commits what the first process has written. If one process dies, the others are killed, the step fails
with one message, and a rerun continues from the last checkpoint, with any number of processes.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.models.devices import device_of
from sera_core.models.shared_policies import release_policies
from tasks.engines.child_process import release_process, start
from tasks.engines.child_step import Channel
from tasks.engines.members import Listening, Member, asked_of_each, together
from tasks.engines.start_check import StartDiffersError

LOG = logging.getLogger("sera.train")
EXPLAIN_SECONDS = 5
"""Time after the first sign of trouble in which its cause may show: others fail when one dies."""


# -------------------------------------------------------------------------------------------------- the owner


def train_in_processes(attempt: Attempt, count: int, work: str) -> list[str]:
    """Train in `count` processes; returns the files that the first one wrote.

    Args:
        attempt: the step's; its counts and metrics are set.
        count: number of processes, at least 2.
        work: what each process does, as `module:function` (request, channel) -> result.

    Raises:
        SeraError: a process raised it (same class), or died; the message says how.
    """
    release_process()
    release_policies()
    for policy in ("start", "model"):
        attempt.input(policy).folder("policy")  # fetched once, not by each process
    attempt.parts()  # known before one is dropped
    attempt.environment["processes"] = count
    try:
        result = _train(attempt, count, work, None)
    except StartDiffersError as error:
        LOG.warning("%s; retrying once", error)
        result = _train(attempt, count, work, error.margin)
    attempt.counts.update(result["counts"])
    attempt.metrics |= result["metrics"]
    return result["files"]


def _train(attempt: Attempt, count: int, work: str, first_margin: float | None) -> dict[str, Any]:
    """One try; returns the first process's result."""
    with tempfile.TemporaryDirectory(prefix="sera-processes-") as folder:
        members = _done_by(attempt, requests_of(attempt, count, work, folder, first_margin))
        grown = [member.done["grown"] for member in members]  # each watched its own
        attempt.memory.grown = sum(grown) if device_of(attempt.execution.device) == "cpu" else max(grown)
        return members[0].done


def requests_of(
    attempt: Attempt, count: int, work: str, folder: str, first_margin: float | None
) -> list[dict[str, Any]]:
    """What each of `count` processes is asked to do.

    Args:
        attempt, count, work: as in `train_in_processes`.
        folder: where they meet and put temporary files.
        first_margin: margin at step 0, in nats, with which the first try was refused; else None.
    """
    shared = {"count": count, "folder": folder, "first_margin": first_margin}
    shared["attempt"] = [attempt.id, str(attempt.folder)]
    asked = asked_of_each(attempt, count, work, device_of(attempt.execution.device))
    return [request | {"rank": {"rank": rank, **shared}} for rank, request in enumerate(asked)]


@dataclass(eq=False)
class _Trainer(Member):
    """One of the processes; see `SharedAttempt`."""

    margin: float = 0.0
    """Of a `StartDiffersError`, in nats."""

    def _hear_progress(self, report: list[Any]) -> None:
        self.attempt.progress(*report)

    def _hear_commit(self, part: list[Any]) -> None:
        self.say(self.attempt.commit_part(*part))

    def _hear_drop(self, number: int) -> None:
        self.attempt.drop_part(number)

    def _hear_margin(self, margin: float) -> None:
        self.margin = margin

    def _hear_error(self, error: list[str]) -> None:
        super()._hear_error(error)
        if isinstance(self.error, StartDiffersError):
            self.error.margin = self.margin


def _done_by(attempt: Attempt, requests: list[dict[str, Any]]) -> list[_Trainer]:
    """Start the processes and wait until all are done.

    Raises:
        SeraError: one of them failed.
    """
    with together(_Trainer) as members:
        try:
            for rank, request in enumerate(requests):
                members.append(_Trainer(attempt, rank, len(requests), start(request, stays=True)))
            _listen(members)
        except BaseException:
            if attempt.execution.tracking != "none" and members:
                members.pop(0).child.end(politely=True)  # so that the tracker's run is closed
            raise
        return list(members)


def _listen(members: list[_Trainer]) -> None:
    """Take messages and output until every process is done.

    Raises:
        SeraError: one of them failed.
    """
    trouble: float | None = None
    with Listening() as listening:
        for member in members:
            listening.to(member)
        while not all(member.done for member in members):
            heard = listening.turn()
            failed = [member for member in members if member.failed]
            if failed:
                trouble = trouble or time.monotonic()
                clear = any(member.was_killed for member in failed) or len(failed) == len(members)
                if (clear and not heard) or time.monotonic() > trouble + EXPLAIN_SECONDS:
                    raise _explanation(failed)


def _explanation(failed: list[_Trainer]) -> SeraError:
    """What to say about processes that failed: one that was killed made others fail, else the first did."""
    cause = min(failed, key=lambda member: (not member.was_killed, member.failed_at))
    cause.show_last_lines()
    if cause.error is not None:
        return cause.error
    return SeraError(
        f"step {cause.attempt.spec.step}: {cause.name} {cause.how_it_ended()}, so the "
        "others were ended; run the same command again to continue from the last checkpoint"
    )


# -------------------------------------------------------------------------------------------- each of them


class SharedAttempt(Attempt):
    """The attempt in one of its processes: it writes files, and the owner commits them."""

    def __init__(self, request: dict[str, Any], channel: Channel) -> None:
        rank = request["rank"]
        self.channel, self.first = channel, rank["rank"] == 0
        super().__init__(
            open_store(request["store"], remember=True),
            StepSpec.model_validate(request["spec"]),
            ExecutionConfig.model_validate(request["execution"]),
            self._tell_progress,
            (rank["attempt"][0], Path(rank["attempt"][1])),
        )

    def _tell_progress(self, *report: Any) -> None:
        if self.first:
            self.channel.tell(progress=report)

    def commit_part(self, number: int, files: list[str], info: dict[str, Any]) -> dict[str, Any]:
        assert self.first, "only the first process commits"
        return self.channel.ask(commit=[number, files, info])

    def drop_part(self, number: int) -> None:
        self.channel.tell(drop=number)
